"""Loss -> trained weights: recipes, schedule, distributed, checkpoints, monitors, run log."""
