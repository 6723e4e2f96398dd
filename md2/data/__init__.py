"""From shards to batches: DALI, augmentation, and the threads that convert images on the CPU."""
