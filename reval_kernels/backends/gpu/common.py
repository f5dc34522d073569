"""Code that the kernel files share: the launch, and the arithmetic of the parts of a row.

Letters: N tokens, M rows of logits, V words of the vocabulary, P parts of a row, T the temperature, x a logit
after the softcap and before the temperature.

A part holds the sums over some entries x of one row:
    m  the maximum of x
    s  sum of exp((x - m) / T) over all entries without one entry at the maximum
    t  sum of exp((x - m) / T) (x - m), which only the entropy needs
In memory, parts [4, M, P] hold m, s, t and the action's logit before the softcap (0 in the parts without the action).

Reason for s: the weight of the maximum is exp(0) = 1. Added to 1, the other weights would lose digits: float32 cannot
hold 1 + 1e-9. In a confident state, 1 - p consists of these digits.
An empty part (no entry above -inf) has m = LOWEST, not -inf, so that m - m is 0 and never NaN. It has s = -1, so that
its total weight 1 + s is 0 at every temperature. At T = 1e38, exp((LOWEST - m) / T) is not small.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import RowValues, Transform

# Triton reads this setting when the kernels below are decorated, and not later.
INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# In place of 1 / T = 0 at T = inf: -inf * 0 would be NaN. Triton 3.6 takes a plain number below 2^-126 for fp64.
LEAST = tl.constexpr(1.401298464324817e-45)
SMALLEST = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
ASSERTS = {"debug": True, "sanitize_overflow": False}
"""Without `debug` Triton drops each device_assert; with it Triton would also check sums of integers for overflow."""


# --- host -----------------------------------------------------------------------------------------------------------


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument. For CPU tensors it runs in Triton's interpreter."""
    device = getattr(args[0], "base", args[0]).device  # a descriptor has its tensor as `base`
    # Without fusion each product is rounded by itself, as in the interpreter. So x * scale - row_max is exactly 0 for
    # the largest x.
    constants["enable_fp_fusion"] = False
    if INTERPRETED:
        from .interpreter import faithful

        with faithful(asserts=constants.get("debug", False)):
            kernel[grid](*args, **constants)
    elif device.type != "cuda":
        raise ValueError(
            f"backend 'triton' computes on CUDA tensors, got tensors on {device}. Leave `backend` out there, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels in Triton's (slow) interpreter"
        )
    elif device.index == torch.cuda.current_device():
        kernel[grid](*args, **constants)
    else:
        with torch.cuda.device(device):  # without this the launch goes to the current device
            kernel[grid](*args, **constants)


def temperatures(transform: Transform) -> tuple[Tensor | None, float]:
    """The temperatures [N] or None, and the one temperature that a kernel uses where they are None."""
    each = transform.temperatures
    return (None, transform.temperature) if each is None else (each.reshape(-1).contiguous(), 1.0)


def new_values(like: Tensor, mask: Tensor | None) -> RowValues:
    """New float32 tensors [...] for the six numbers of each row of `like` [..., *]. Masked rows, which no kernel
    writes, are 0."""
    new = torch.empty if mask is None else torch.zeros
    return RowValues(*(new(like.shape[:-1], dtype=torch.float32, device=like.device) for _ in RowValues._fields))


def merge_parts(
    parts: Tensor,
    index: Tensor | None,
    mask: Tensor | None,
    transform: Transform,
    with_entropy: bool,
    out: RowValues,
) -> None:
    """Join the parts [4, M, P] of M rows, and write the six numbers of each unmasked row to `out`.

    The numbers of row i go to position index[i], or to position i if `index` is None. Temperatures and mask are [M].
    """
    rows, count = parts.shape[1:]
    padded = triton.next_power_of_2(count)
    together = max(1, min(32, 4096 // padded))
    per_token, temperature = temperatures(transform)
    launch(
        merge,
        (triton.cdiv(rows, together),),
        parts,
        index,
        mask,
        per_token,
        *out,
        rows,
        count,
        temperature,
        transform.softcap or 1.0,
        SOFTCAP=transform.softcap is not None,
        ENTROPY=with_entropy,
        PADDED=padded,
        ROWS=together,
        num_warps=4,
    )


# --- device ---------------------------------------------------------------------------------------------------------


@triton.jit
def expm1(x):
    """exp(x) - 1 to a few ulp. The interpreter does not have the expm1 of libdevice."""
    # Taylor series up to x^8 for |x| < 1/2: the relative error is below x^8 / 9! < 1e-8
    near = 0.0013888889 + x * (0.0001984127 + x * 2.4801587e-05)
    near = 0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * near)))
    return tl.where(tl.abs(x) < 0.5, x + x * x * near, tl.exp2(x * LOG2E) - 1)


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap), and its derivative in x, each to a few ulp."""
    softcap = tl.cast(softcap, tl.float32)  # some compilers pass Python's floats as fp64
    y = tl.abs(x) * (-2 / softcap)
    e = expm1(y)
    t = tl.exp2(y * LOG2E)
    rest = 2 * t / (1 + t)  # 1 - tanh, without cancellation for large |x|
    tanh = tl.where(y > -0.8, -e / (2 + e), 1 - rest)
    slope = tl.where(y > -1, 1 - tanh * tanh, rest * (2 - rest))
    return tl.where(x < 0, -softcap, softcap) * tanh, slope


@triton.jit
def temperature_at(temperatures, token, inside, temperature):
    """The temperatures of these tokens if every token has its own, else the one `temperature`."""
    # One return: the compiler wants one type from all returns, also from a return that None makes unreachable.
    if temperatures is not None:
        out = tl.load(temperatures + token, mask=inside, other=1.0).to(tl.float32)
    else:
        out = tl.cast(temperature, tl.float32)  # some compilers pass Python's floats as fp64
    return out


@triton.jit
def exponent_of(temperature):
    """log2(e) / T, so that exp((x - m) / T) = exp2((x - m) * exponent)."""
    return tl.maximum(tl.div_rn(tl.zeros_like(temperature) + LOG2E, temperature), tl.full([], LEAST, tl.float32))


@triton.jit
def inverse_of(temperature):
    """1 / T."""
    return tl.maximum(1 / temperature, tl.full([], LEAST, tl.float32))


@triton.jit
def divided(x, temperature):
    """x / T, correctly rounded; -inf stays -inf at T = inf."""
    return tl.where(x == float("-inf"), x, tl.div_rn(x, temperature))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to a few ulp."""
    # 2 atanh(w), as a series for x < 1/2: the relative error is below w^10 / 11 < 1e-8
    w = x / (2 + x)
    w2 = w * w
    near = 2 * w * (1 + w2 * (0.33333334 + w2 * (0.2 + w2 * (0.14285715 + w2 * 0.11111111))))
    return tl.where(x < 0.5, near, tl.log(1 + x))


@triton.jit
def action_gradient(log_pi, d_q, d_v, d_log):
    """The gradient of the action's z, without the entropy's term, from log_pi = log pi(action)."""
    # log_prob has the derivative 1 - p at the action. It comes from expm1, so a confident state keeps its gradient.
    # The product dv * p is a separate term, so an unlikely action keeps its gradient.
    return d_q + d_v * tl.exp2(log_pi * LOG2E) - d_log * expm1(log_pi)


@triton.jit
def join(m, s, t, exponent, ROWS: tl.constexpr):
    """Join the parts along the last axis: m, s, t are [P], or [rows, P] if ROWS is 1. `exponent` is log2(e) / T of each
    row."""
    total_m = tl.max(m, ROWS)
    if ROWS:
        apart = m - total_m[:, None]
        weight = tl.exp2(apart * exponent[:, None])
        top = m == total_m[:, None]
    else:
        apart = m - total_m
        weight = tl.exp2(apart * exponent)
        top = m == total_m
    # The total weight of a part is its s plus the 1 of its own maximum. Of the parts with the joint maximum, one leaves
    # its 1 out, as s requires. The 1s of the other such parts are counted in a separate sum: 1 + 1e-6 would lose digits
    # of the 1e-6.
    others = tl.sum(tl.where(top, s, (1 + s) * weight), ROWS) + (tl.sum(top.to(tl.float32), ROWS) - 1)
    t = tl.sum(weight * (t + (1 + s) * tl.maximum(apart, LOWEST)), ROWS)
    return total_m, others, t


@triton.jit
def numbers(m, s, t, x_action, temperature):
    """q, v, log_prob, entropy, row_max, log_sum from the joined part of a whole row."""
    nothing = (m == LOWEST) & (s < 0)
    # as in logsumexp: v is -inf if all logits are -inf, and +inf if one logit is +inf
    row_max = tl.where(nothing | (m == float("inf")), 0.0, m)
    log_sum = tl.where(nothing, float("-inf"), tl.where(m == float("inf"), m, log1p(s)))
    log_prob = divided(x_action - row_max, temperature) - log_sum
    entropy = log_sum - t / temperature / (1 + s)
    v = divided(row_max, temperature) + log_sum
    # row_max is rounded as the backward rounds x * (1 / temperature): their difference is exactly 0 for the largest x
    return divided(x_action, temperature), v, log_prob, entropy, row_max * inverse_of(temperature), log_sum


@triton.jit
def store_numbers(q, v, log_prob, entropy, row_max, log_sum, token, a, b, c, d, e, f, inside):
    """Store the six numbers a ... f of these tokens; `inside` is None or a mask."""
    tl.store(q + token, a, mask=inside)
    tl.store(v + token, b, mask=inside)
    tl.store(log_prob + token, c, mask=inside)
    tl.store(entropy + token, d, mask=inside)
    tl.store(row_max + token, e, mask=inside)
    tl.store(log_sum + token, f, mask=inside)


@triton.jit
def merge(
    parts,
    index,
    mask,
    temperatures,
    q,
    v,
    log_prob,
    entropy,
    row_max,
    log_sum,
    rows,
    count,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Join the parts [4, M, P] that several programs wrote, and store the six numbers of each row: 0 for masked rows.
    The order of the sums is fixed, so the result is the same in every run."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    taken = inside
    if mask is not None:
        taken = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    temperature = temperature_at(temperatures, row, taken, temperature) + tl.zeros([ROWS], tl.float32)
    part = tl.arange(0, PADDED)
    at = parts + row.to(tl.int64)[:, None] * count + part[None, :]
    there = taken[:, None] & (part < count)[None, :]
    plane = tl.cast(rows, tl.int64) * count
    m = tl.load(at, mask=there, other=LOWEST)  # past the last part: empty parts
    s = tl.load(at + plane, mask=there, other=-1.0)
    t = tl.zeros([ROWS, PADDED], tl.float32)
    if ENTROPY:
        t = tl.load(at + 2 * plane, mask=there, other=0.0)
    x_action = tl.sum(tl.load(at + 3 * plane, mask=there, other=0.0), 1)
    if SOFTCAP:
        x_action = capped(x_action, softcap)[0]
    m, s, t = join(m, s, t, exponent_of(temperature), 1)
    token = row.to(tl.int64)
    if index is not None:
        token = tl.load(index + row, mask=inside, other=0)
    a, b, c, d, e, f = numbers(m, s, t, x_action, temperature)
    if mask is not None:  # the other rows have numbers of empty parts, such as v = -inf
        a, b, c = tl.where(taken, a, 0.0), tl.where(taken, b, 0.0), tl.where(taken, c, 0.0)
        d, e, f = tl.where(taken, d, 0.0), tl.where(taken, e, 0.0), tl.where(taken, f, 0.0)
    d = d if ENTROPY else tl.zeros_like(d)
    store_numbers(q, v, log_prob, entropy, row_max, log_sum, token, a, b, c, d, e, f, inside)
