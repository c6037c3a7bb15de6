"""A small piece of the web on loopback: composed pictures, LAION-schema metadata, and a server that misbehaves a little."""
