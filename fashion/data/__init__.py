"""The data set: find or download the archives, verify, split and write them as Parquet, read them back, shard them."""
