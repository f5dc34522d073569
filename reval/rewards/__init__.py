"""Rewards: functions that score completions, the processes that run them, and the shaping of their scores.

Nothing here imports torch, transformers or numpy: every worker process imports this package, and a worker that was
killed must be back in a fraction of a second.
"""

from reval.rewards.pool import RewardPool, Scores
from reval.rewards.shaping import reward_metrics, shape_rewards
from reval.rewards.verifiers import VERIFIERS, RewardError, resolve

__all__ = ["VERIFIERS", "RewardError", "RewardPool", "Scores", "resolve", "reward_metrics", "shape_rewards"]
