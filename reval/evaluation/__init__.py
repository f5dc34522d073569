"""What `reval evaluate` measures beside accuracy: estimators, benchmarks, and the comparison of two runs."""
