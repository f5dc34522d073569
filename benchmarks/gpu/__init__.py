"""What tools/gpu_check.py runs on a GPU machine, part by part, and the bars of a GPU."""
