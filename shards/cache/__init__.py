"""A verified local copy of remote shards."""
