"""filter: keeps the rows whose pixels and captions are worth encoding."""
