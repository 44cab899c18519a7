"""Uses of a trained network: evaluation on a split, and export."""
