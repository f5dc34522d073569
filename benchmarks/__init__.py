"""What the fused ops are worth on this machine, beside whatever else computes the same: `python -m benchmarks`."""
