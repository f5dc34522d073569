"""Token values and their gradient from logits.

Forward: one program reads a row of logits once, in blocks, and writes six numbers (q, v, log_prob, entropy, row_max,
log_sum). Several programs share a long row, so that even a few rows keep a GPU busy. Then a second kernel merges their
parts (see common.py) in a fixed order. The number of programs for a row depends on V alone, so a row's numbers do not
depend on the rest of the batch.
Backward: a program reads its entries of the row again and writes their gradient in the dtype of the logits.
Probabilities and fp32 copies of the logits are never stored. Masked rows are not read. An entry costs one exp2.

Letters: N tokens, n one of them, V words of the vocabulary, x a logit, z the logit after softcap and temperature,
p = softmax(z).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import Cotangents, RowValues, Statistics, Tokens, Transform
from .. import portable
from .common import (
    LOG2E,
    LOWEST,
    capped,
    expm1,
    exponent_of,
    inverse_of,
    join,
    launch,
    merge_parts,
    new_values,
    numbers,
    temperature_at,
    temperatures,
)


@triton.jit
def row_forward(
    logits,
    actions,
    mask,
    temperatures,
    parts,
    q,
    v,
    log_prob,
    entropy,
    row_max,
    log_sum,
    tokens,
    vocabulary,
    inner,
    blocks,
    stride_outer,
    stride_inner,
    stride_v,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (n, k) reads `blocks` blocks of row n, the k-th such run. Row n = (n // inner, n % inner)."""
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if mask is not None:
        if tl.load(mask + token) == 0:
            return
    row = logits + (token // inner) * stride_outer + (token % inner) * stride_inner
    temperature = temperature_at(temperatures, token, True, temperature)
    exponent = exponent_of(temperature)
    first = split * blocks * BLOCK
    last = tl.minimum(first + blocks * BLOCK, vocabulary)

    # Every lane keeps a separate part (m, s, t). The lanes exchange data only once, at the end.
    lane = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], LOWEST, tl.float32)
    s = tl.full([BLOCK], -1.0, tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    for start in range(first, last, BLOCK):
        column = start + lane
        inside = column < last
        x = tl.load(row + column.to(tl.int64) * stride_v, mask=inside, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            x, _ = capped(x, softcap)
            x = tl.where(inside, x, float("-inf"))  # only now, after the softcap, which makes -inf finite
        rise = x - m
        # if x is a new maximum, e is the factor of the old sums; else e is the weight of x. So one exp2 serves both
        e = tl.exp2(-tl.abs(rise) * exponent)
        if ENTROPY:
            step = tl.minimum(tl.maximum(rise, LOWEST), -LOWEST)  # 0 * inf would be NaN
            t = tl.where(rise > 0, (t - (1 + s) * step) * e, t + e * step)
        s = tl.where(rise > 0, s * e, s) + e
        m = tl.maximum(m, x)
    m, s, t = join(m, s, t, exponent, 0)

    action = tl.minimum(tl.maximum(tl.load(actions + token).to(tl.int64), 0), vocabulary - 1)
    mine = (action >= first) & (action < last)
    x = tl.load(row + action * stride_v, mask=mine, other=0.0).to(tl.float32)
    if SOFTCAP:
        x, _ = capped(x, softcap)
    if SPLITS > 1:
        at = parts + token * SPLITS + split
        plane = tl.cast(tokens, tl.int64) * SPLITS  # Triton makes a size of 1 a constant, which has no `to`
        tl.store(at, m)
        tl.store(at + plane, s)
        tl.store(at + 2 * plane, t)
        tl.store(at + 3 * plane, x)  # 0 if this program does not read the action; softcap(0) is 0 too
    else:
        a, b, c, d, e, f = numbers(m, s, t, x, temperature)
        tl.store(q + token, a)
        tl.store(v + token, b)
        tl.store(log_prob + token, c)
        tl.store(entropy + token, d if ENTROPY else 0.0)
        tl.store(row_max + token, e)
        tl.store(log_sum + token, f)


@triton.jit
def row_backward(
    logits,
    out,
    actions,
    mask,
    temperatures,
    row_max,
    log_sum,
    entropy,
    dq,
    dv,
    dlog_prob,
    dentropy,
    vocabulary,
    inner,
    blocks,
    stride_outer,
    stride_inner,
    stride_v,
    out_stride_outer,
    out_stride_inner,
    out_stride_v,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (n, k) writes the gradient of `blocks` blocks of row n. `out` may be `logits`.

    docs/method.md section 4: dlogits = dq * onehot + dv * softmax, with log_prob = q - v. And
    d entropy / dz = -p (log p + entropy).
    """
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = logits + (token // inner) * stride_outer + (token % inner) * stride_inner
    out_row = out + (token // inner) * out_stride_outer + (token % inner) * out_stride_inner
    first = split * blocks * BLOCK
    last = tl.minimum(first + blocks * BLOCK, vocabulary)
    lane = tl.arange(0, BLOCK)
    if mask is not None:
        if tl.load(mask + token) == 0:
            for start in range(first, last, BLOCK):
                column = start + lane
                tl.store(
                    out_row + column.to(tl.int64) * out_stride_v,
                    tl.zeros([BLOCK], out.dtype.element_ty),
                    mask=column < last,
                )
            return

    scale = inverse_of(temperature_at(temperatures, token, True, temperature))
    top, log_total, h = tl.load(row_max + token), tl.load(log_sum + token), tl.load(entropy + token)
    d_q, d_v = tl.load(dq + token), tl.load(dv + token)
    d_log, d_entropy = tl.load(dlog_prob + token), tl.load(dentropy + token)
    action = tl.load(actions + token).to(tl.int64)
    mine = (action >= first) & (action < last)
    x_action = tl.load(row + action * stride_v, mask=mine, other=0.0).to(tl.float32)
    tl.debug_barrier()  # if out is logits, another warp soon overwrites the entry read here
    if SOFTCAP:
        x_action, _ = capped(x_action, softcap)
    log_pi = (x_action * scale - top) - log_total
    p = tl.exp2(log_pi * LOG2E)
    # log_prob has the derivative 1 - p at the action. It comes from expm1, so a confident state keeps its gradient.
    # The product dv * p is a separate term, so an unlikely action keeps its gradient.
    at_action = d_q + d_v * p - d_log * expm1(log_pi) - d_entropy * p * (tl.maximum(log_pi, -1000.0) + h)
    # The loop computes p = exp(z - max) / sum. Where p is largest, the exponent is near 0, so it is nearly exact.
    share = tl.exp2(-log_total * LOG2E)
    d_all, d_spread, h = (d_v - d_log) * share, d_entropy * share, h - log_total

    for start in range(first, last, BLOCK):
        column = start + lane
        inside = column < last
        x = tl.load(row + column.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        slope = scale
        if SOFTCAP:
            x, slope = capped(x, softcap)
            slope = slope * scale
        below = x * scale - top
        # p log p must be 0, its limit, where p = 0 and log p = -inf. So log p is at least -1000, where p is already 0
        g = tl.exp2(below * LOG2E) * (d_all - d_spread * (tl.maximum(below, -1000.0) + h))
        g = tl.where(column == action, at_action, g) * slope
        tl.store(out_row + column.to(tl.int64) * out_stride_v, g.to(out.dtype.element_ty), mask=inside)


def token_values(logits: Tensor, tokens: Tokens, transform: Transform, with_entropy: bool) -> RowValues:
    """See Backend.token_values."""
    strides = two_strides(logits)
    if strides is None or logits.dtype == torch.float64:
        return portable.token_values(logits, tokens, transform, with_entropy)
    out = new_values(logits, tokens.mask)
    forward(logits, strides, tokens, transform, with_entropy, out)
    return out


def forward(
    logits: Tensor,
    strides: tuple[int, int, int],
    tokens: Tokens,
    transform: Transform,
    with_entropy: bool,
    out: RowValues,
) -> None:
    """Write the six numbers of every unmasked row to `out`."""
    count, vocabulary = tokens.actions.numel(), logits.shape[-1]
    if count == 0:
        return
    block, warps, blocks, splits = row_blocks(vocabulary)
    mask = None if tokens.mask is None else tokens.mask.contiguous()
    parts = out.q.new_empty(4, count, splits) if splits > 1 else None
    per_token, temperature = temperatures(transform)
    launch(
        row_forward,
        (count, splits),
        logits,
        tokens.actions.contiguous(),
        mask,
        per_token,
        parts,
        *out,
        count,
        vocabulary,
        strides[0],
        blocks,
        *strides[1:],
        logits.stride(-1),
        temperature,
        transform.softcap or 1.0,
        SOFTCAP=transform.softcap is not None,
        ENTROPY=with_entropy,
        SPLITS=splits,
        BLOCK=block,
        num_warps=warps,
    )
    if parts is not None:
        merge_parts(parts, None, mask, transform, with_entropy, out)


def token_values_backward(
    logits: Tensor,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    inplace: bool,
) -> Tensor:
    """See Backend.token_values_backward."""
    strides = two_strides(logits)
    if strides is None or logits.dtype == torch.float64:
        return portable.token_values_backward(logits, tokens, transform, statistics, cotangents, inplace)
    out = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward(logits, strides, out, tokens, transform, statistics, cotangents)
    return out


def backward(
    logits: Tensor,
    strides: tuple[int, int, int],
    out: Tensor,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
) -> None:
    """Write the gradient of every row to `out`, 0 for masked rows. `out` has any dtype, and may be the logits."""
    count, vocabulary = tokens.actions.numel(), logits.shape[-1]
    if count == 0:
        return
    block, warps, blocks, splits = row_blocks(vocabulary)
    per_token, temperature = temperatures(transform)
    out_strides = strides if out is logits else (strides[0], strides[0] * vocabulary, vocabulary)
    launch(
        row_backward,
        (count, splits),
        logits,
        out,
        tokens.actions.contiguous(),
        None if tokens.mask is None else tokens.mask.contiguous(),
        per_token,
        *(x.contiguous() for x in (*statistics, *cotangents)),
        vocabulary,
        strides[0],
        blocks,
        *strides[1:],
        logits.stride(-1),
        *out_strides[1:],
        out.stride(-1),
        temperature,
        transform.softcap or 1.0,
        SOFTCAP=transform.softcap is not None,
        BLOCK=block,
        num_warps=warps,
    )


def row_blocks(vocabulary: int) -> tuple[int, int, int, int]:
    """Block size, warps, blocks per program, programs per row. docs/kernels.md gives the reasons."""
    block = min(4096, triton.next_power_of_2(vocabulary))
    blocks = triton.cdiv(vocabulary, block)
    each = triton.cdiv(blocks, triton.cdiv(blocks, 16))
    return block, max(1, min(8, block // 512)), each, triton.cdiv(blocks, each)


def two_strides(logits: Tensor) -> tuple[int, int, int] | None:
    """(inner, stride_outer, stride_inner) of logits [..., V]: row n begins at n // inner * stride_outer + n % inner *
    stride_inner. None if two strides cannot describe the rows."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    (_, outer), (inner, step) = [(1, 0)] * (2 - len(dims)) + dims
    return inner, outer, step
