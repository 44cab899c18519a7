"""Distributed training and search of a Fashion-MNIST classifier on Ray, measured into Parquet reports."""
