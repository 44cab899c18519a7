"""Training on Ray Train: workers, trainer, gradients between ranks."""
