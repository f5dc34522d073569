"""Time and memory of the fused ops and of other libraries for the same work: `python -m benchmarks`."""
