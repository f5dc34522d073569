"""ReVal and its family of losses. Each objective is a function from one micro-batch to a loss.

Letters: B trajectories, M actions in all, H of the longest trajectory. D = sum_h (log pi - log pi_ref)(a_h|s_h), over
the actions of a trajectory. r is the shaped reward and beta its temperature. Values are in units of reward / beta.

Every objective sums over its trajectories and divides by a number of the whole batch on all processes (`Totals`). The
losses of the micro-batches then add up to the loss of the batch.

This module has the losses that square a residual; policy_gradients.py has GRPO and its relatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reval_kernels import TokenValues, linear_reval_loss, linear_token_values
from reval_kernels.hf import OutputHead

from .batching import Batch
from .config import ObjectiveConfig


class Totals(NamedTuple):
    """Numbers of the whole batch, on all processes."""

    trajectories: int
    actions: int
    longest: int
    """The most actions that a response can have by the settings: rollout.max_new_tokens or environment.max_tokens."""


class Reference(NamedTuple):
    """The reference policy's values of a batch; constants."""

    v: Tensor
    """float32 [B], V_ref(s_1)"""
    log_prob: Tensor
    """float32 [B], sum_h log pi_ref(a_h|s_h)"""
    returns: Tensor
    """float32 [B], R_ref: the sum of `v` and `log_prob`, rounded once."""
    values: TokenValues | None = None
    """float32 [M]; only for objective.level=token and subtrajectory, which need the values of single tokens."""
    log_z: Tensor | None = None
    """float32 [B], mean_G (r / beta - D) over the group's trajectories in the whole batch; only for tba."""


class ObjectiveOutput(NamedTuple):
    """The loss of a micro-batch, and for the metrics its residuals and the terms of each residual, detached."""

    loss: Tensor
    """float32 scalar, differentiable."""
    residual: Tensor
    """float32 [B]"""
    v: Tensor
    """float32 [B], V(s_1)"""
    log_ratio: Tensor
    """float32 [B], D"""


def reval(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """The squared Bellman residual V(s_1) - V_ref(s_1) + D - r / beta (arXiv 2603.23355, Eq. 2).

    The residual is the sum of the TD errors d_h of a trajectory (docs/method.md section 3). The loss sums the squares
    of the whole residual (objective.level=trajectory), of every d_h (token), or of the sum from each d_h to the end
    (subtrajectory). For objective.taper and objective.value_gradient see `modified`.
    """
    if config.taper or not config.value_gradient:
        return modified(hidden, head, batch, reference, config, totals)
    known = reference.returns if config.level == "trajectory" else reference.values
    assert known is not None, "reference_policy.py keeps token values for the levels that need them"
    loss, residual = linear_reval_loss(
        hidden,
        actions=batch.actions,
        reference=known,
        rewards=batch.rewards,
        cu_seqlens=batch.cu_seqlens,
        beta=config.beta,
        level=config.level,
        semi_gradient=config.semi_gradient,
        normalizer=totals.trajectories,
        **head._asdict(),
    )
    v = _first_v(hidden, head, batch)
    return ObjectiveOutput(loss, residual, v, residual - (v - reference.v) + batch.rewards / config.beta)


def tbrm(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """(V(s_1) + D - r / beta)^2: ReVal with V_ref := 0 (arXiv 2505.15311)."""
    loss, residual = linear_reval_loss(
        hidden,
        actions=batch.actions,
        reference=reference.log_prob,
        rewards=batch.rewards,
        cu_seqlens=batch.cu_seqlens,
        beta=config.beta,
        normalizer=totals.trajectories,
        **head._asdict(),
    )
    v = _first_v(hidden, head, batch)
    return ObjectiveOutput(loss, residual, v, residual - v + batch.rewards / config.beta)


def modified(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """`reval` with one or both of two changes, by the longer way over token values.

    objective.taper multiplies the squared residual by min(1, pi(tau) / mu(tau)) where the reward r is negative; this
    weight is TOPR's (arXiv 2503.14286) and gets no gradient. A replayed response that was wrong pushes its own
    probability down again and again. Once the policy no longer writes it, that push only moves probability to arbitrary
    other responses.

    objective.value_gradient=false stops the gradient at V(s_1), as in Eq. 4 of the ReVal paper. Rewards from which the
    group's mean is subtracted leave V nothing to learn, and V takes part of every step.
    """
    values = TokenValues(
        *(batch.pad(x) for x in linear_token_values(hidden, actions=batch.actions, **head._asdict())[:3])
    )
    log_prob, v = values.log_prob.sum(1), values.v[:, 0]
    v = v if config.value_gradient else v.detach()
    residual = v - reference.v + log_prob - reference.log_prob - batch.rewards / config.beta
    weight = taper_weight(values, batch) if config.taper else 1.0
    loss = (weight * residual.square()).sum() / totals.trajectories
    residual, v = residual.detach(), v.detach()
    return ObjectiveOutput(loss, residual, v, residual - (v - reference.v) + batch.rewards / config.beta)


def log_ratio(values: TokenValues, batch: Batch) -> Tensor:
    """log pi / mu of each action: float32 [B, H], 0 where batch.mask is false. Where mu is not known the ratio is 1 and
    only carries the gradient."""
    return values.log_prob - batch.behavior.where(~batch.behavior.isnan(), values.log_prob.detach())


def taper_weight(values: TokenValues, batch: Batch) -> Tensor:
    """min(1, pi(tau) / mu(tau)) where the reward is negative, else 1: float32 [B], without gradient."""
    return log_ratio(values, batch).sum(1).clamp(max=0).exp().detach().where(batch.rewards < 0, 1.0)


@torch.no_grad()
def _first_v(hidden: Tensor, head: OutputHead, batch: Batch) -> Tensor:
    """V(s_1) [B]. The fused loss returns no token values, and one state per trajectory costs little."""
    first = batch.cu_seqlens[:-1]
    return linear_token_values(hidden[first], actions=batch.actions[first], **head._asdict()).v


def regression(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """(D - r / beta)^2, without any V. The shaping of r decides whose loss it is.

    reward.shaping=centered, r minus the group's mean: Kimi k1.5 (arXiv 2501.12599). soft_centered, r minus the group's
    soft mean: OAPL.
    """
    residual = values.log_prob.sum(1) - reference.log_prob - batch.rewards / config.beta
    return from_values(residual.square().sum() / totals.trajectories, residual, values, batch, config)


def tba(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """(D - r / beta + log Z)^2 with log Z = mean_G (r / beta - D), a constant (TBA, arXiv 2503.18929).

    Trajectory balance, with the log of the partition function from the group (VarGrad) in place of a learned V.
    """
    assert reference.log_z is not None, "the learner computes log Z before the update"
    residual = values.log_prob.sum(1) - reference.log_prob - batch.rewards / config.beta
    loss = (residual + reference.log_z).square().sum() / totals.trajectories
    return from_values(loss, residual, values, batch, config)


def from_values(
    loss: Tensor, residual: Tensor, values: TokenValues, batch: Batch, config: ObjectiveConfig
) -> ObjectiveOutput:
    """The output of an objective with the residual D - r / beta."""
    residual, v = residual.detach(), values.v[:, 0].detach()
    return ObjectiveOutput(loss, residual, v, residual + batch.rewards / config.beta)


FusedObjective = Callable[[Tensor, OutputHead, Batch, Reference, ObjectiveConfig, Totals], ObjectiveOutput]
FUSED: dict[str, FusedObjective] = {"reval": reval, "tbrm": tbrm}
"""Objectives that need hidden states and the head: their kernel computes loss and gradient in one pass."""

ValueObjective = Callable[[TokenValues, Batch, Reference, ObjectiveConfig, Totals], ObjectiveOutput]
"""Objectives that are arithmetic on token values, [B, H]."""
