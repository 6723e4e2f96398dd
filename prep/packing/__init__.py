"""From a split's lines to shards: plan, encode, assemble, publish."""
