"""A checkpoint with its codecs, and sheets of what it draws."""
