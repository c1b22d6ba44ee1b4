"""Fine-tuning, and the semi-supervised protocols."""
