"""Evaluation besides accuracy: pass@k and similar estimators, benchmarks, and the comparison of two runs."""
