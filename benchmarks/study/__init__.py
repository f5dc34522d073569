"""Studies: methods compared on fast tasks, with equal tuning and several seeds. `python -m benchmarks.study NAME`."""
