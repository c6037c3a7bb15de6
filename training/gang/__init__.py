"""A group of workers under Ray Train: its start, its signs of life, and how it is known that it has lost one."""
