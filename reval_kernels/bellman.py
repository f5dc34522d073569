"""The light half: TD targets and Bellman losses, arithmetic on a few numbers a token."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, library
from .types import BellmanLoss, TDTargets, TokenValues


def td_targets(
    values: TokenValues,
    reference: TokenValues,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    gamma: float = 1.0,
    backend: str | None = None,
) -> TDTargets:
    """TD target, TD error and endogenous reward of every action.

    With h the action's place in its trajectory of H actions, and V(s_{H+1}) = 0 (arXiv 2603.23355, the Bellman operator
    behind Eq. 2; the endogenous reward is that of arXiv 2506.23235):

        e_h = Q_ref(s_h, a_h) - gamma V_ref(s_{h+1})
        y_h = e_h + 1[h=H] r / beta + gamma V(s_{h+1})
        d_h = Q(s_h, a_h) - y_h

    Args:
        values: the policy's TokenValues, [B, T] padded or [N] packed; q and v are used and may carry gradient.
        reference: the reference policy's, of the same shape; constants.
        rewards: [B] float, the outcome reward r of each trajectory; constants.
        mask: [B, T] or [N] bool, true where the token is an action. s_{h+1} is the state of the next action, whatever
            tokens of the environment lie between.
        cu_seqlens: [B + 1] int32 or int64, where the packed trajectories start and end: 0, ..., N.
        beta: the reward's temperature, positive.
        gamma: the discount.
        backend: as in `token_values`.

    Returns:
        TDTargets(target, error, endogenous_reward) of the values' shape and dtype, 0 where masked out. Target and error
        are differentiable in values.q and values.v (detach `target` for a semi-gradient).

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    if not isinstance(reference, TokenValues):
        raise TypeError(f"reference must be TokenValues (returns are not enough), got {type(reference).__name__}")
    _check_values(values)
    checks.bellman_arguments(values.q.shape, values.q.device, reference, rewards, mask, cu_seqlens, beta)
    target, error, endogenous = library.td_targets(
        values.q, values.v, list(reference[:2]), rewards, mask, cu_seqlens, float(beta), float(gamma), backend
    )
    return TDTargets(target, error, endogenous.detach())  # a constant: an op's outputs all carry its gradient


def bellman_loss(
    values: TokenValues,
    reference: TokenValues | Tensor,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    level: str = "trajectory",
    semi_gradient: bool = False,
    normalizer: float | None = None,
    backend: str | None = None,
) -> BellmanLoss:
    """The squared Bellman residual of whole trajectories (arXiv 2603.23355, Eq. 2), or of their parts.

        residual = sum_h d_h = V(s_1) - V_ref(s_1) + sum_h (log pi - log pi_ref)(a_h|s_h) - r / beta

        level "trajectory":     loss = sum over trajectories of residual^2 / normalizer
        level "token":          loss = sum over trajectories and h of d_h^2 / normalizer
        level "subtrajectory":  loss = sum over trajectories and h of (sum_{k>=h} d_k)^2 / normalizer

    The policy's and the reference's values are subtracted from each other first, so a policy equal to its reference
    with r = 0 has loss and gradient exactly 0. TBRM (arXiv 2505.15311) is `reference` = sum_h log pi_ref, without
    V_ref.

    Args:
        values: the policy's TokenValues, [B, T] padded or [N] packed, differentiable.
        reference: the reference policy's TokenValues of the same shape, or its returns [B],
            V_ref(s_1) + sum_h log pi_ref(a_h|s_h), which are enough for level "trajectory"; constants.
        rewards, mask, cu_seqlens, beta, backend: as in `td_targets`.
        level: "trajectory", "token" or "subtrajectory".
        semi_gradient: level "token" only: no gradient through the TD target (arXiv 2505.15311, appendix H.3, shows the
            residual-gradient form collapse).
        normalizer: what the sum is divided by; by default the number of trajectories B. Pass the number in the whole
            batch to make micro-batches and ranks add up to it.

    Returns:
        BellmanLoss(loss [], residual [B]), both differentiable. A trajectory without actions has residual 0.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    _check_values(values)
    checks.bellman_arguments(values.q.shape, values.q.device, reference, rewards, mask, cu_seqlens, beta)
    checks.level(level, reference, semi_gradient, normalizer)
    loss, residual, *_ = library.bellman_loss(
        *values[:3],
        reference_tensors(reference),
        rewards,
        mask,
        cu_seqlens,
        float(beta),
        level,
        semi_gradient,
        normalizer_tensor(normalizer),
        backend,
    )
    return BellmanLoss(loss, residual)


def reference_tensors(reference: TokenValues | Tensor) -> list[Tensor]:
    """The reference as the ops take it: (q, v, log_prob) per token, or (returns [B],)."""
    return [reference] if isinstance(reference, Tensor) else list(reference[:3])


def normalizer_tensor(normalizer: float | None) -> Tensor | None:
    """As the ops take it: torch.compile makes one graph for all values of a tensor, and one for each of a number."""
    return None if normalizer is None else torch.ones((), dtype=torch.float64, device="cpu") * normalizer


def _check_values(values: TokenValues) -> None:
    if not isinstance(values, TokenValues):
        raise TypeError(f"values must be TokenValues, got {type(values).__name__}")
    checks.tensor("values.q", values.q, checks.WIDE, None, None)
    for name in ("v", "log_prob"):
        checks.tensor(f"values.{name}", getattr(values, name), (values.q.dtype,), values.q.shape, values.q.device)
