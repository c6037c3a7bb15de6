"""download: from addresses to WebDataset shards."""
