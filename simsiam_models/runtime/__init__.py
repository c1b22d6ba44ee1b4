"""What every long run needs: processes, files, checkpoints, signals, logs."""
