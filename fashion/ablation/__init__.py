"""The ablation study: how much each measure against overfitting changes."""
