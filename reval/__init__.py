"""ReVal: off-policy reinforcement learning of language models whose logits are Q-values."""

__version__ = "0.1.0"  # as in reval_kernels, whose import would load torch
