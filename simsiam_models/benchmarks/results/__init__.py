"""Records of benchmarks, and the tables that compare them."""
