"""Rewards: functions that score completions, and the worker processes that run them.

This package does not import torch, transformers or numpy. Every worker process imports this package, and a new
worker must replace a killed one in a fraction of a second.
"""

from reval.rewards.pool import AllFailedError, RewardPool, Scores
from reval.rewards.verifiers import ROUNDING, VERIFIERS, RewardError, check_columns, resolve

__all__ = ["ROUNDING", "VERIFIERS", "AllFailedError", "RewardError", "RewardPool", "Scores", "check_columns", "resolve"]
