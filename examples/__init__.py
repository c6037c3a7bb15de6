"""Runnable examples: the little web that the demo reads, and the encoders that it ships."""
