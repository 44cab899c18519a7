"""The network, its variants, and its CPU kernels."""
