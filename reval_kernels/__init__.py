"""Fused value-based, off-policy losses for language models, as any RL codebase can import them.

A language model's logits are soft Q-values and their logsumexp is V (ReVal, arXiv 2603.23355). `token_values` and
`linear_token_values` read both off a model; `td_targets` and `bellman_loss` are arithmetic on them; `reval_loss` and
`linear_reval_loss` go the whole way in one call. `reference` holds the definitions.
"""

from . import reference
from .backends import backends
from .losses import bellman_loss, linear_reval_loss, reval_loss, td_targets
from .types import BellmanLoss, TDTargets, TokenValues
from .values import linear_token_values, token_values

__all__ = [
    "BellmanLoss",
    "TDTargets",
    "TokenValues",
    "backends",
    "bellman_loss",
    "linear_reval_loss",
    "linear_token_values",
    "reference",
    "reval_loss",
    "td_targets",
    "token_values",
]
