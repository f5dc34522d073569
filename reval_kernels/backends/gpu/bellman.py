"""TD targets and Bellman losses from a few numbers per token: one launch, one program for each trajectory.

A program first lists the positions of its trajectory's actions. The list has no environment tokens and no padding, so
the next action is always the next element. Then the program goes through the list. It reads every number at most twice,
and writes every number of its trajectory, 0 where a token is no action: the outputs need no zeros before. Sums run in a
fixed order and within one trajectory only: the result is the same in every run, and packed trajectories cannot affect
each other. Sums are in fp64, because a residual is a small difference of sums over thousands of tokens; for a few
numbers per token fp64 costs nothing.

Letters: N tokens, B trajectories, b one trajectory, h = 1 ... H its actions, d_h the TD error of action h.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...checks import check_cu_seqlens
from ...contract import BellmanOptions, Layout, Level, LossTerms, Reference, UnitGradients
from ...types import TokenValues
from .. import portable
from .common import ASSERTS, launch

BLOCK = 1024
TRAJECTORY, TOKEN = tl.constexpr(int(Level.TRAJECTORY)), tl.constexpr(int(Level.TOKEN))


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _list_actions(mask, cu_seqlens, where, out_a, out_b, out_c, tokens, length, BLOCK: tl.constexpr):
    """The start of this program's trajectory, and the number of its actions.

    With a mask, writes the positions of the actions to `where` [N], beginning at where[start], and 0 to the outputs at
    all other tokens of the trajectory. Without a mask every token is an action. Two of the outputs may be the same.
    """
    b = tl.program_id(0).to(tl.int64)
    start, end = b * length, (b + 1) * length
    if cu_seqlens is not None:
        start, end = tl.load(cu_seqlens + b).to(tl.int64), tl.load(cu_seqlens + b + 1).to(tl.int64)
        whole = ((b > 0) | (start == 0)) & ((b + 1 < tl.num_programs(0)) | (end == tokens))
        tl.device_assert(whole & (start <= end), "cu_seqlens must be 0, ..., N and never fall")
        # before a wrong cu_seqlens is reported, it must not cause an access outside the tensors
        start, end = tl.minimum(tl.maximum(start, 0), tokens), tl.minimum(end, tokens)
    count = tl.maximum(end - start, 0)
    if mask is not None:
        count = count * 0
        for at in range(start, end, BLOCK):
            token = at + tl.arange(0, BLOCK)
            inside = token < end
            taken = tl.load(mask + token, mask=inside, other=0).to(tl.int32)
            rank = tl.cumsum(taken, 0) - taken
            tl.store(where + start + count + rank, token, mask=taken != 0)
            count += tl.sum(taken, 0)
            other = inside & (taken == 0)
            tl.store(out_a + token, tl.zeros([BLOCK], tl.float32), mask=other)
            tl.store(out_b + token, tl.zeros([BLOCK], tl.float32), mask=other)
            tl.store(out_c + token, tl.zeros([BLOCK], tl.float32), mask=other)
        tl.debug_barrier()  # a thread reads positions that other threads wrote
    return start, count


@triton.jit
def _outcome(rewards, beta):
    """r / beta of this program's trajectory in fp64, from the reward rounded to fp32, the dtype of the values."""
    return tl.load(rewards + tl.program_id(0)).to(tl.float32).to(tl.float64) / beta


@triton.jit
def _action(where, start, step, count, MASKED: tl.constexpr):
    """The position of the trajectory's action number `step`, counted from 0."""
    if MASKED:
        return tl.load(where + start + step, mask=step < count, other=0)
    return start + step


@triton.jit
def _wide(x, token, inside):
    """Numbers in fp64. They are rounded to fp32 first, the dtype of the values: a reference may be wider."""
    return tl.load(x + token, mask=inside, other=0.0).to(tl.float32).to(tl.float64)


@triton.jit
def td_kernel(
    q,
    v,
    q_ref,
    v_ref,
    rewards,
    mask,
    cu_seqlens,
    where,
    target,
    error,
    endogenous,
    tokens,
    length,
    beta: tl.float64,
    gamma,
    BLOCK: tl.constexpr,
):
    """The formulas of docs/method.md section 2, for every action of trajectory b."""
    gamma = tl.cast(gamma, tl.float32)  # some compilers pass Python's floats as fp64
    start, count = _list_actions(mask, cu_seqlens, where, target, error, endogenous, tokens, length, BLOCK)
    outcome = _outcome(rewards, beta)
    for at in range(0, count, BLOCK):
        step = at + tl.arange(0, BLOCK)
        inside, more = step < count, step + 1 < count
        here = _action(where, start, step, count, mask is not None)
        after = _action(where, start, step + 1, count, mask is not None)
        v_next = _wide(v, after, more)
        v_ref_next = _wide(v_ref, after, more)
        q_here = _wide(q, here, inside)
        q_ref_here = _wide(q_ref, here, inside)
        earned = tl.where(step + 1 == count, outcome, 0.0)
        reward = q_ref_here - gamma * v_ref_next
        tl.store(endogenous + here, reward, mask=inside)
        tl.store(target + here, reward + earned + gamma * v_next, mask=inside)
        # subtract the reference first: each difference is exactly 0 where policy and reference agree
        tl.store(error + here, (q_here - q_ref_here) - gamma * (v_next - v_ref_next) - earned, mask=inside)


@triton.jit
def td_backward_kernel(
    d_target,
    d_error,
    mask,
    cu_seqlens,
    where,
    dq,
    dv,
    tokens,
    length,
    gamma,
    BLOCK: tl.constexpr,
):
    """Writes dq of every action, and dv of the next action."""
    gamma = tl.cast(gamma, tl.float32)
    start, count = _list_actions(mask, cu_seqlens, where, dq, dv, dv, tokens, length, BLOCK)
    first = _action(where, start, count * 0, count, mask is not None)
    tl.store(dv + first, 0.0, mask=count > 0)  # no TD target or error of a trajectory reads V of its first state
    for at in range(0, count, BLOCK):
        step = at + tl.arange(0, BLOCK)
        inside, more = step < count, step + 1 < count
        here = _action(where, start, step, count, mask is not None)
        after = _action(where, start, step + 1, count, mask is not None)
        of_target = tl.load(d_target + here, mask=inside, other=0.0)
        of_error = tl.load(d_error + here, mask=inside, other=0.0)
        tl.store(dq + here, of_error, mask=inside)
        tl.store(dv + after, gamma * (of_target - of_error), mask=more)


@triton.jit
def _minus(x, reference, token, inside, PER_TOKEN: tl.constexpr):
    """x - reference, subtracted before any sum: exactly 0 where policy and reference agree."""
    difference = _wide(x, token, inside)
    if PER_TOKEN:
        difference -= _wide(reference, token, inside)
    return difference


@triton.jit
def loss_kernel(
    q,
    v,
    log_prob,
    q_ref,
    v_ref,
    log_prob_ref,
    returns,
    rewards,
    mask,
    cu_seqlens,
    where,
    loss,
    residual,
    dq,
    dv,
    dlog_prob,
    tokens,
    length,
    beta: tl.float64,
    weight: tl.float64,
    PER_TOKEN: tl.constexpr,
    LEVEL: tl.constexpr,
    SEMI_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """docs/method.md sections 3 and 4 for trajectory b. Writes its part of the loss, its residual, and dq, dv and
    dlog_prob of its tokens.

    LEVEL is a `contract.Level`; `weight` is 1 / normalizer.
    """
    b = tl.program_id(0)
    start, count = _list_actions(mask, cu_seqlens, where, dq, dv, dlog_prob, tokens, length, BLOCK)
    outcome = _outcome(rewards, beta)
    scale = 2 * weight
    nothing = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float64)
    for at in range(0, count, BLOCK):
        step = at + tl.arange(0, BLOCK)
        token = _action(where, start, step, count, mask is not None)
        sums += _minus(log_prob, log_prob_ref, token, step < count, PER_TOKEN)
    first = _action(where, start, count * 0, count, mask is not None)
    total = _minus(v, v_ref, first, count > 0, PER_TOKEN) + tl.sum(sums, 0)
    if not PER_TOKEN:
        # The policy's return is rounded to fp32 as the reference's was: equal policies have the residual 0.
        total = total.to(tl.float32).to(tl.float64) - _wide(returns, b, True)
    total = tl.where(count > 0, total - outcome, 0.0)
    tl.store(residual + b, total)

    squares = tl.zeros([BLOCK], tl.float64)
    if LEVEL == TRAJECTORY:
        for at in range(0, count, BLOCK):
            step = at + tl.arange(0, BLOCK)
            token = _action(where, start, step, count, mask is not None)
            inside = step < count
            tl.store(dlog_prob + token, nothing + total * scale, mask=inside)
            tl.store(dv + token, tl.where(step == 0, total * scale, 0.0), mask=inside)
            tl.store(dq + token, nothing, mask=inside)
        tl.store(loss + b, total * total * weight)
    elif LEVEL == TOKEN:
        tl.store(dv + first, 0.0, mask=count > 0)
        for at in range(0, count, BLOCK):
            step = at + tl.arange(0, BLOCK)
            inside, more = step < count, step + 1 < count
            here = _action(where, start, step, count, mask is not None)
            after = _action(where, start, step + 1, count, mask is not None)
            term = _minus(q, q_ref, here, inside, PER_TOKEN) - _minus(v, v_ref, after, more, PER_TOKEN)
            term = tl.where(inside, term - tl.where(step + 1 == count, outcome, 0.0), 0.0)
            squares += term * term
            tl.store(dq + here, scale * term, mask=inside)
            tl.store(dv + after, nothing if SEMI_GRADIENT else -scale * term, mask=more)
            tl.store(dlog_prob + here, nothing, mask=inside)
        tl.store(loss + b, tl.sum(squares, 0) * weight)
    else:
        # The first loop goes from the last action to the first: c_h = sum over k >= h of d_k. The second loop goes from
        # the first action to the last: dlog_prob_h = sum over k <= h of dv_k.
        to_go = total * 0
        blocks = tl.cdiv(count, BLOCK)
        for i in range(0, blocks):
            step = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            inside = step < count
            token = _action(where, start, step, count, mask is not None)
            dlog = _minus(log_prob, log_prob_ref, token, inside, PER_TOKEN)
            term = _minus(v, v_ref, token, inside, PER_TOKEN) + (tl.cumsum(dlog, 0, reverse=True) + to_go) - outcome
            term = tl.where(inside, term, 0.0)
            to_go += tl.sum(dlog, 0)
            squares += term * term
            tl.store(dv + token, scale * term, mask=inside)
        tl.store(loss + b, tl.sum(squares, 0) * weight)
        tl.debug_barrier()
        so_far = total * 0
        for at in range(0, count, BLOCK):
            step = at + tl.arange(0, BLOCK)
            inside = step < count
            token = _action(where, start, step, count, mask is not None)
            term = tl.load(dv + token, mask=inside, other=0.0).to(tl.float64)
            tl.store(dlog_prob + token, tl.cumsum(term, 0) + so_far, mask=inside)
            tl.store(dq + token, nothing, mask=inside)
            so_far += tl.sum(term, 0)


@triton.jit
def loss_backward_kernel(
    d_loss,
    d_residual,
    unit_q,
    unit_v,
    unit_log_prob,
    mask,
    cu_seqlens,
    where,
    dq,
    dv,
    dlog_prob,
    tokens,
    length,
    BLOCK: tl.constexpr,
):
    """The unit gradients times the upstream gradient of the loss, plus the gradient through the residual."""
    start, count = _list_actions(mask, cu_seqlens, where, dq, dv, dlog_prob, tokens, length, BLOCK)
    of_loss = tl.load(d_loss)
    of_residual = tl.full([], 0.0, tl.float32)
    if d_residual is not None:
        of_residual = tl.load(d_residual + tl.program_id(0))
    for at in range(0, count, BLOCK):
        step = at + tl.arange(0, BLOCK)
        inside = step < count
        token = _action(where, start, step, count, mask is not None)
        tl.store(dq + token, of_loss * tl.load(unit_q + token, mask=inside, other=0.0), mask=inside)
        first = tl.where(step == 0, of_residual, 0.0)
        tl.store(dv + token, of_loss * tl.load(unit_v + token, mask=inside, other=0.0) + first, mask=inside)
        log_prob = of_loss * tl.load(unit_log_prob + token, mask=inside, other=0.0) + of_residual
        tl.store(dlog_prob + token, log_prob, mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------
# The kernels check cu_seqlens themselves (CHECKS_DATA). What no kernel of this file computes is checked here.


class _Launch:
    """A launch of one program for each trajectory; `layout` holds the kernels' arguments for the layout."""

    def __init__(self, like: Tensor, layout: Layout):
        mask, cu_seqlens = layout
        self.tokens = like.numel()
        self.trajectories = like.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.length = like.shape[-1]
        if not self.trajectories:
            check_cu_seqlens(layout, like)
        where = None if mask is None else like.new_empty(self.tokens, dtype=torch.int64)
        self.layout = (
            None if mask is None else mask.contiguous(),
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            where,
        )

    def __call__(self, kernel, *args, **constants) -> None:
        if self.trajectories:
            launch(kernel, (self.trajectories,), *args, BLOCK=BLOCK, num_warps=4, **ASSERTS, **constants)


def td_targets(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See Backend.td_targets."""
    q, v = values.q, values.v
    if q.dtype == torch.float64:
        check_cu_seqlens(layout, q)
        return portable.td_targets(values, reference, rewards, layout, beta, gamma)
    run = _Launch(q, layout)
    target, error, endogenous = (q.new_empty(q.shape) for _ in range(3))
    run(
        td_kernel,
        *_contiguous((q, v, *reference[:2], rewards)),
        *run.layout,
        target,
        error,
        endogenous,
        run.tokens,
        run.length,
        beta,
        gamma,
    )
    return target, error, endogenous


def td_targets_backward(d_target: Tensor, d_error: Tensor, layout: Layout, gamma: float) -> tuple[Tensor, Tensor]:
    """See Backend.td_targets_backward."""
    if d_error.dtype == torch.float64:
        return portable.td_targets_backward(d_target, d_error, layout, gamma)
    run = _Launch(d_error, layout)
    dq, dv = (d_error.new_empty(d_error.shape) for _ in range(2))
    run(
        td_backward_kernel,
        *_contiguous((d_target, d_error)),
        *run.layout,
        dq,
        dv,
        run.tokens,
        run.length,
        gamma,
    )
    return dq, dv


def bellman_loss(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    options: BellmanOptions,
) -> LossTerms:
    """See Backend.bellman_loss."""
    q = values.q
    if q.dtype == torch.float64:
        check_cu_seqlens(layout, q)
        return portable.bellman_loss(values, reference, rewards, layout, options)
    run = _Launch(q, layout)
    residual = q.new_empty(run.trajectories)
    parts = q.new_empty(run.trajectories, dtype=torch.float64)
    dq, dv, dlog_prob = (q.new_empty(q.shape) for _ in range(3))
    run(
        loss_kernel,
        *_contiguous((*values[:3], *reference, rewards)),
        *run.layout,
        parts,
        residual,
        dq,
        dv,
        dlog_prob,
        run.tokens,
        run.length,
        options.beta,
        1 / options.divisor(run.trajectories),
        PER_TOKEN=reference.returns is None,
        **loss_constants(options),
    )
    return LossTerms(parts.sum().to(q.dtype), residual, dq, dv, dlog_prob)


def loss_constants(options: BellmanOptions) -> dict[str, Any]:
    """The options that are compile-time constants of loss_kernel."""
    return {"LEVEL": int(options.level), "SEMI_GRADIENT": options.semi_gradient}


def bellman_loss_backward(
    d_loss: Tensor, d_residual: Tensor | None, unit: UnitGradients, layout: Layout
) -> UnitGradients:
    """See Backend.bellman_loss_backward."""
    if unit.dq.dtype == torch.float64:
        return portable.bellman_loss_backward(d_loss, d_residual, unit, layout)
    run = _Launch(unit.dq, layout)
    out = UnitGradients(*(x.new_empty(x.shape) for x in unit))
    run(
        loss_backward_kernel,
        *_contiguous((d_loss, d_residual, *unit)),
        *run.layout,
        *out,
        run.tokens,
        run.length,
    )
    return out


def _contiguous(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]
