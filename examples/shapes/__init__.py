"""The known-truth experiment: a world of shapes whose every distribution is known, and a small network that learns them."""
