"""Training on Ray Train: the trainer, its workers and their data, the exchange of gradients, and a watchdog."""
