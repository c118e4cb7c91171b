"""WebDataset shards: making them, checking them, and the index that says where every sample lies."""
