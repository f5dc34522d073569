"""TD targets and Bellman losses in PyTorch, from a few numbers per token.

The portable backend uses these functions, and the GPU backend for float64 tensors. The faster versions are
cpu/bellman.cpp and gpu/bellman.py.

Letters: B trajectories, L actions of the longest one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import BellmanOptions, Layout, Level, LossTerms, Reference, UnitGradients
from ..types import TokenValues
from .trajectories import Trajectories, next_state


def td_targets(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See Backend.td_targets."""
    assert reference.q_ref is not None and reference.v_ref is not None, "td_targets takes the reference's token values"
    q, v = values.q, values.v
    trajectories = Trajectories(q.shape, q.device, layout)
    q_ref, v_ref = (trajectories.rows(x.to(q.dtype)) for x in (reference.q_ref, reference.v_ref))
    q, v_next, v_ref_next = trajectories.rows(q), next_state(trajectories.rows(v)), next_state(v_ref)
    outcome = torch.where(trajectories.last, _scaled(rewards, beta, q)[:, None], 0)
    endogenous = q_ref - gamma * v_ref_next
    # subtract the reference first: each difference is exactly 0 where policy and reference agree
    error = (q - q_ref) - gamma * (v_next - v_ref_next) - outcome
    return (
        trajectories.tokens(endogenous + outcome + gamma * v_next),
        trajectories.tokens(error),
        trajectories.tokens(torch.where(trajectories.valid, endogenous, 0)),
    )


def td_targets_backward(d_target: Tensor, d_error: Tensor, layout: Layout, gamma: float) -> tuple[Tensor, Tensor]:
    """See Backend.td_targets_backward."""
    trajectories = Trajectories(d_error.shape, d_error.device, layout)
    d_error = trajectories.rows(d_error)
    return trajectories.tokens(d_error), trajectories.tokens(
        _previous_state(gamma * (trajectories.rows(d_target) - d_error))
    )


def bellman_loss(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    options: BellmanOptions,
) -> LossTerms:
    """See Backend.bellman_loss."""
    trajectories = Trajectories(values.q.shape, values.q.device, layout)
    q, v, log_prob = (trajectories.rows(x) for x in values[:3] if x is not None)
    outcome = _scaled(rewards, options.beta, q)
    if reference.returns is not None:
        d_q, d_v, d_log = q, v, log_prob
        # Summed in float64 and rounded once, as the reference's return was: equal policies have the residual 0.
        wide = q.dtype if q.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        returns = _first(v).to(wide) + log_prob.sum(1, dtype=wide)
        residual = returns.to(q.dtype) - reference.returns.to(q.dtype) - outcome
    else:
        # subtract the reference first: each difference is exactly 0 where policy and reference agree
        d_q, d_v, d_log = (
            x - trajectories.rows(ref.to(x.dtype))
            for x, ref in zip((q, v, log_prob), reference[:3], strict=True)
            if ref is not None
        )
        residual = _first(d_v) + d_log.sum(1) - outcome
    residual = torch.where(trajectories.counts > 0, residual, 0)

    divisor = options.divisor(len(rewards))
    scale = 2 / divisor
    dq, dv, dlog = (torch.zeros_like(q) for _ in range(3))
    if options.level == Level.TRAJECTORY:
        terms = residual
        dv[:, :1] = scale * residual[:, None]
        dlog += scale * residual[:, None]
    elif options.level == Level.TOKEN:
        terms = torch.where(
            trajectories.valid, d_q - next_state(d_v) - torch.where(trajectories.last, outcome[:, None], 0), 0
        )
        dq += scale * terms
        if not options.semi_gradient:
            dv = _previous_state(-scale * terms)
    else:
        assert options.level == Level.SUBTRAJECTORY, options.level
        # the sum over k >= h of the TD errors d_k telescopes
        to_go = d_log.flip(1).cumsum(1).flip(1)
        terms = torch.where(trajectories.valid, d_v + to_go - outcome[:, None], 0)
        dv += scale * terms
        dlog = (scale * terms).cumsum(1)
    loss = terms.square().sum() / divisor
    return LossTerms(loss, residual, trajectories.tokens(dq), trajectories.tokens(dv), trajectories.tokens(dlog))


def bellman_loss_backward(
    d_loss: Tensor, d_residual: Tensor | None, unit: UnitGradients, layout: Layout
) -> UnitGradients:
    """See Backend.bellman_loss_backward."""
    trajectories = Trajectories(unit.dq.shape, unit.dq.device, layout)
    dq, dv, dlog = (trajectories.rows(d_loss * x) for x in unit)
    if d_residual is not None:
        dv[:, :1] += d_residual[:, None]
        dlog += d_residual[:, None]
    return UnitGradients(*(trajectories.tokens(x) for x in (dq, dv, dlog)))


def _scaled(rewards: Tensor, beta: float, like: Tensor) -> Tensor:
    return rewards.to(like.dtype) / beta


def _first(x: Tensor) -> Tensor:
    """The first column of [B, L], 0 where L = 0."""
    return x[:, 0] if x.shape[1] else x.new_zeros(len(x))


def _previous_state(d_next: Tensor) -> Tensor:
    """The gradient of v [B, L] from the gradient of next_state(v)."""
    out = torch.zeros_like(d_next)
    out[:, 1:] = d_next[:, :-1]
    return out
