"""`simsiam preflight`: survey the data, try the training step, recommend a command."""
