"""The ablation study: what each cure against overfitting changes."""
