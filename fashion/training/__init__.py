"""One rank's training, without Ray."""
