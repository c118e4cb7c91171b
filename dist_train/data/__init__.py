"""From shards to batches: which sample when, how it is varied, and its way to the device."""
