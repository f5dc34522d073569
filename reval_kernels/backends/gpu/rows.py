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

from ...checks import check_token_data
from ...contract import Cotangents, RowValues, Statistics, Tokens, Transform
from .. import portable
from .common import (
    ASSERTS,
    LOG2E,
    LOWEST,
    SMALLEST,
    action_gradient,
    capped,
    exponent_of,
    inverse_of,
    join,
    launch,
    merge_parts,
    new_values,
    numbers,
    store_numbers,
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
    CONTIGUOUS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Program (n, k) reads `blocks` blocks of row n, the k-th such run. Row n = (n // inner, n % inner)."""
    token, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if mask is not None:
        if tl.load(mask + token) == 0:
            if SPLITS == 1:  # else `merge` writes the row's numbers
                store_numbers(q, v, log_prob, entropy, row_max, log_sum, token, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, None)
            return
    row = logits + (token // inner) * stride_outer + (token % inner) * stride_inner
    temperature = temperature_at(temperatures, token, True, temperature)
    if temperatures is not None:
        tl.device_assert(temperature >= SMALLEST, "temperature must be positive, and not below the smallest float32")
    exponent = exponent_of(temperature)
    first = split * blocks * BLOCK
    last = tl.minimum(first + blocks * BLOCK, vocabulary)

    action = tl.load(actions + token).to(tl.int64)
    tl.device_assert((action >= 0) & (action < vocabulary), "actions must lie in [0, V)")
    action = tl.minimum(tl.maximum(action, 0), vocabulary - 1)
    mine = (action >= first) & (action < last)
    x_action = tl.load(row + action * stride_v, mask=mine, other=0.0).to(tl.float32)

    # Every group of NEIGHBOURS lanes keeps a separate part (m, s, t). The groups exchange data only once, at the end.
    GROUPS: tl.constexpr = BLOCK // NEIGHBOURS
    lane = tl.arange(0, BLOCK)
    m = tl.full([GROUPS], LOWEST, tl.float32)
    s = tl.full([GROUPS], -1.0, tl.float32)
    t = tl.zeros([GROUPS], tl.float32)
    for start in range(first, last, BLOCK):
        column = start + lane
        inside = column < last
        x = tl.load(row + offset_of(column, stride_v, CONTIGUOUS), mask=inside, other=float("-inf")).to(tl.float32)
        if SOFTCAP:
            x = capped(x, softcap)[0]
            x = tl.where(inside, x, float("-inf"))  # only now, after the softcap, which makes -inf finite
        x = tl.reshape(x, (GROUPS, NEIGHBOURS))
        top = tl.maximum(m, tl.max(x, 1))
        below = x - top[:, None]
        p = tl.exp2(below * exponent)
        at_top = x == top[:, None]
        tops = tl.sum(at_top.to(tl.float32), 1)
        fall = tl.exp2((m - top) * exponent)
        if ENTROPY:
            t = (t + (1 + s) * tl.maximum(m - top, LOWEST)) * fall
            t += tl.sum(p * tl.maximum(below, LOWEST), 1)  # 0 * inf would be NaN
        # s leaves one entry at the maximum out: the old one while the maximum stays, else one of the new ones
        s = tl.where(m == top, s + tops, (1 + s) * fall + (tops - 1)) + tl.sum(tl.where(at_top, 0.0, p), 1)
        m = top
    m, s, t = join(m, s, t, exponent, 0)

    if SPLITS > 1:
        at = parts + token * SPLITS + split
        plane = tl.cast(tokens, tl.int64) * SPLITS  # Triton makes a size of 1 a constant, which has no `to`
        tl.store(at, m)
        tl.store(at + plane, s)
        tl.store(at + 2 * plane, t)
        tl.store(at + 3 * plane, x_action)
    else:
        if SOFTCAP:
            x_action = capped(x_action, softcap)[0]
        a, b, c, d, e, f = numbers(m, s, t, x_action, temperature)
        store_numbers(q, v, log_prob, entropy, row_max, log_sum, token, a, b, c, d if ENTROPY else 0.0, e, f, None)


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
    CONTIGUOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (n, k) writes the gradient of `blocks` blocks of row n. `out` may be `logits`.

    docs/method.md section 4: dlogits = dq * onehot + dv * softmax, with log_prob = q - v. And
    d entropy / dz = -p (log p + entropy), where `dentropy` is given.
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
                at = out_row + offset_of(column, out_stride_v, CONTIGUOUS)
                tl.store(at, tl.zeros([BLOCK], out.dtype.element_ty), mask=column < last)
            return

    scale = inverse_of(temperature_at(temperatures, token, True, temperature))
    top, log_total = tl.load(row_max + token), tl.load(log_sum + token)
    d_q, d_v, d_log = tl.load(dq + token), tl.load(dv + token), tl.load(dlog_prob + token)
    action = tl.load(actions + token).to(tl.int64)
    mine = (action >= first) & (action < last)
    x_action = tl.load(row + action * stride_v, mask=mine, other=0.0).to(tl.float32)
    tl.debug_barrier()  # if out is logits, another warp soon overwrites the entry read here
    if SOFTCAP:
        x_action = capped(x_action, softcap)[0]
    log_pi = (x_action * scale - top) - log_total
    at_action = action_gradient(log_pi, d_q, d_v, d_log)
    # The loop computes p = exp(z - max) / sum. Where p is largest, the exponent is near 0, so it is nearly exact.
    share = tl.exp2(-log_total * LOG2E)
    d_all = (d_v - d_log) * share
    if dentropy is not None:
        h, d_entropy = tl.load(entropy + token), tl.load(dentropy + token)
        at_action -= d_entropy * tl.exp2(log_pi * LOG2E) * (tl.maximum(log_pi, -1000.0) + h)
        d_spread, h = d_entropy * share * scale, h - log_total
    d_all, at_action = d_all * scale, at_action * scale

    here = tl.where(mine, action, -1).to(tl.int32)  # a comparison of 64 bits for each entry would cost two of 32
    for start in range(first, last, BLOCK):
        column = start + lane
        inside = column < last
        x = tl.load(row + offset_of(column, stride_v, CONTIGUOUS), mask=inside, other=0.0).to(tl.float32)
        if SOFTCAP:
            x, slope = capped(x, softcap)
        below = x * scale - top
        g = tl.exp2(below * LOG2E)
        if dentropy is not None:
            # p log p must be 0, its limit, where p = 0 and log p = -inf. So log p is at least -1000, where p is 0
            g = g * (d_all - d_spread * (tl.maximum(below, -1000.0) + h))
        else:
            g = g * d_all
        g = tl.where(column == here, at_action, g)
        if SOFTCAP:
            g = g * slope
        at = out_row + offset_of(column, out_stride_v, CONTIGUOUS)
        tl.store(at, g.to(out.dtype.element_ty), mask=inside)


@triton.jit
def offset_of(column, stride_v, CONTIGUOUS: tl.constexpr):
    """Where a column lies in its row: 32-bit arithmetic if the words of a row lie side by side, else 64-bit."""
    if CONTIGUOUS:
        out = column
    else:
        out = column.to(tl.int64) * stride_v
    return out


def token_values(logits: Tensor, tokens: Tokens, transform: Transform, with_entropy: bool) -> RowValues:
    """See Backend.token_values."""
    strides = two_strides(logits)
    if strides is None or logits.dtype == torch.float64:
        if logits.device.type == "cuda":  # here no kernel of ours checks the data (CHECKS_DATA)
            check_token_data(tokens, transform, logits.shape[-1], logits)
        return portable.token_values(logits, tokens, transform, with_entropy)
    out = new_values(logits, None)
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
    """Write the six numbers of every row to `out`; they are 0 for masked rows."""
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
        CONTIGUOUS=logits.stride(-1) == 1,
        SPLITS=splits,
        BLOCK=block,
        NEIGHBOURS=min(block, 16 // logits.itemsize),
        num_warps=warps,
        **ASSERTS,
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
        *(None if x is None else x.contiguous() for x in (*statistics, *cotangents)),
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
        CONTIGUOUS=logits.stride(-1) == 1,
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
