"""The benchmarks of a backbone, one folder for each."""
