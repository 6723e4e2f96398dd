"""What a sample is on disk: tar shards, their DALI index, the dataset manifest, object storage."""
