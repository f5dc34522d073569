"""Fused value-based, off-policy losses for language models, for use in any RL codebase.

A language model's logits are soft Q-values, and their logsumexp is the state value V (ReVal, arXiv 2603.23355).
`token_values` and `linear_token_values` compute Q, V and log pi from a model's outputs. `td_targets` and `bellman_loss`
compute targets and losses from these values. `reval_loss` and `linear_reval_loss` do both steps in one call.
`actions_and_mask` and `until_end` make actions and mask from the tokens of a model. `reference` holds the definitions
in plain PyTorch. A second-order gradient and forward mode (torch.func.jvp) raise RuntimeError; the functions of
`reference` have both.
"""

from . import flops as _flops  # noqa: F401  # registers the formulas
from . import reference
from .backends import backends
from .losses import bellman_loss, linear_reval_loss, reval_loss, td_targets
from .tokens import actions_and_mask, until_end
from .types import BellmanLoss, TDTargets, TokenValues
from .values import linear_token_values, token_values

__version__ = "0.1.0"

__all__ = [
    "BellmanLoss",
    "TDTargets",
    "TokenValues",
    "__version__",
    "actions_and_mask",
    "backends",
    "bellman_loss",
    "linear_reval_loss",
    "linear_token_values",
    "reference",
    "reval_loss",
    "td_targets",
    "token_values",
    "until_end",
]
