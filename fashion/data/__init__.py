"""The data set: found, verified, split, written, read back, and cut into shards."""
