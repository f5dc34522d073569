"""The results of the public functions."""

from typing import NamedTuple

from torch import Tensor
from torch.serialization import add_safe_globals

from .torch_private import allow_export


class TokenValues(NamedTuple):
    """Q, V and log pi of one action in one state, for every token. The losses use no other output of the policy.

    All tensors have the shape [...] of the actions ([B, T] padded or [N] packed) and are float32 (float64 for
    float64 logits). Masked-out positions hold 0. Values are in units of reward / beta.
    """

    q: Tensor
    """Q(s, a): the action's logit, after softcap and temperature."""
    v: Tensor
    """V(s) = logsumexp over the vocabulary."""
    log_prob: Tensor
    """log pi(a|s) = q - v, computed without subtracting two large numbers."""
    entropy: Tensor | None = None
    """Entropy of pi(.|s) in nats; None unless with_entropy is true."""


class TDTargets(NamedTuple):
    """TD targets of docs/method.md section 2. Each tensor is [...] like the token values, and 0 where masked out."""

    target: Tensor
    """y_h = e_h + 1[h=H] r / beta + gamma V(s_{h+1})"""
    error: Tensor
    """d_h = Q(s_h, a_h) - y_h"""
    endogenous_reward: Tensor
    """e_h = Q_ref(s_h, a_h) - gamma V_ref(s_{h+1})"""


class BellmanLoss(NamedTuple):
    """A Bellman loss and the residuals of its trajectories."""

    loss: Tensor
    """Scalar."""
    residual: Tensor
    """[B], sum_h d_h of each trajectory in units of reward / beta; 0 for a trajectory without actions."""


for _type in (TokenValues, TDTargets, BellmanLoss):
    allow_export(_type)
    add_safe_globals([_type])  # torch.load takes the type with weights_only=True, its default
