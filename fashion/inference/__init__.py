"""What is done with a trained network: evaluation and export."""
