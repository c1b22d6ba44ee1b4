"""Pretraining: recipes, options, the training step, journal, kNN monitor and doctor."""
