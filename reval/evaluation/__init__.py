"""Evaluation: answering problems, metrics of the answers, benchmarks, and the comparison of two runs."""
