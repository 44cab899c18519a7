"""One rank's training, without Ray: batches, the training loop, optimizers, a run's epochs, and its checkpoints."""
