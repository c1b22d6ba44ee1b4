"""The data sets of the benchmarks, in the layouts in which they are distributed."""
