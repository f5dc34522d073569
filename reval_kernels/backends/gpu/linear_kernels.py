"""The kernels of linear.py: tiles of logits as tensor-core products, and what becomes of a tile.

Two kernels have the same tiles and the same order of sums. `linear_tiles` reads its operands through pointers and runs
everywhere. `linear_tiles_tma` is for NVIDIA GPUs from Hopper on: programs stay on their processors, take one tile after
another, and read the operands through descriptors, that is, by copies that the hardware makes (TMA).

Letters: M tokens, V words of the vocabulary, D width, T the temperature, x a logit after the softcap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2E, LOWEST, action_gradient, capped, exponent_of, inverse_of, temperature_at


@triton.jit
def place_of(number, rows, tiles, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """The first row and the tile of words of the program, or of the turn, with this number.

    GROUP blocks of tokens go through the vocabulary together. Their hidden states stay in the L2 cache, and the head is
    read from memory once per group.
    """
    group = number // (GROUP * tiles)
    size = tl.minimum(GROUP, tl.cdiv(rows, ROWS) - group * GROUP)
    place = number - group * GROUP * tiles
    return (group * GROUP + place % size) * ROWS, place // size


@triton.jit
def linear_tiles(
    hidden,
    weight,
    bias,
    actions,
    temperatures,
    parts,
    out,
    row_max,
    log_sum,
    entropy,
    dq,
    dv,
    dlog_prob,
    dentropy,
    rows,
    vocabulary,
    width,
    stride_token,
    stride_hidden,
    stride_word,
    stride_weight,
    stride_out,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of logits: ROWS tokens times WORDS words. `finish_tile` says what is written."""
    tiles = tl.cdiv(vocabulary, WORDS)
    first, tile = place_of(tl.program_id(0), rows, tiles, ROWS, GROUP)
    # Past the last token and word the last one is read again, which costs less than a mask. Its result is discarded.
    token = tl.minimum(first + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    word = tl.minimum(tile * WORDS + tl.arange(0, WORDS), vocabulary - 1).to(tl.int64)
    depth = tl.arange(0, DEPTH)
    hidden_at = hidden + token[:, None] * stride_token + depth.to(tl.int64)[None, :] * stride_hidden
    weight_at = weight + word[None, :] * stride_word + depth.to(tl.int64)[:, None] * stride_weight
    x = tl.zeros([ROWS, WORDS], tl.float32)
    for d in range(0, width, DEPTH):
        step = tl.cast(d, tl.int64)
        if EVEN:
            h = tl.load(hidden_at + step * stride_hidden)
            w = tl.load(weight_at + step * stride_weight)
        else:
            h = tl.load(hidden_at + step * stride_hidden, mask=(d + depth < width)[None, :], other=0.0)
            w = tl.load(weight_at + step * stride_weight, mask=(d + depth < width)[:, None], other=0.0)
        x = tl.dot(h, w, x, input_precision=PRECISION)
    finish_tile(
        x,
        first,
        tile,
        bias,
        actions,
        temperatures,
        parts,
        out,
        row_max,
        log_sum,
        entropy,
        dq,
        dv,
        dlog_prob,
        dentropy,
        rows,
        vocabulary,
        tiles,
        stride_out,
        temperature,
        softcap,
        SOFTCAP,
        ENTROPY,
        GRADIENT,
        ROWS,
        WORDS,
    )


@triton.jit
def linear_tiles_tma(
    hidden,
    weight,
    bias,
    actions,
    temperatures,
    parts,
    out,
    row_max,
    log_sum,
    entropy,
    dq,
    dv,
    dlog_prob,
    dentropy,
    rows,
    vocabulary,
    width,
    stride_out,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As linear_tiles, but `hidden` [M, D] and `weight` [V, D] are descriptors, and PROGRAMS programs share the tiles.
    A descriptor reads 0 past the end of its tensor."""
    tiles = tl.cdiv(vocabulary, WORDS)
    for number in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS) * tiles, PROGRAMS, flatten=True):
        first, tile = place_of(number, rows, tiles, ROWS, GROUP)
        x = tl.zeros([ROWS, WORDS], tl.float32)
        for d in range(0, width, DEPTH):
            h = hidden.load([first, d])
            w = weight.load([tile * WORDS, d])
            x = tl.dot(h, w.T, x)
        finish_tile(
            x,
            first,
            tile,
            bias,
            actions,
            temperatures,
            parts,
            out,
            row_max,
            log_sum,
            entropy,
            dq,
            dv,
            dlog_prob,
            dentropy,
            rows,
            vocabulary,
            tiles,
            stride_out,
            temperature,
            softcap,
            SOFTCAP,
            ENTROPY,
            GRADIENT,
            ROWS,
            WORDS,
        )


@triton.jit
def finish_tile(
    x,
    first,
    tile,
    bias,
    actions,
    temperatures,
    parts,
    out,
    row_max,
    log_sum,
    entropy,
    dq,
    dv,
    dlog_prob,
    dentropy,
    rows,
    vocabulary,
    tiles,
    stride_out,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write what the caller needs of a tile x [ROWS, WORDS] of products.

    - GRADIENT: `out` [M, V] is the gradient of the logits, as row_backward of rows.py computes it.
    - else: `parts` [4, M, tiles] (see common.py). And, unless `out` is None, `out` [M, V] is the *weight* of each word,
      exp((x - m) / T) times the slope of the softcap, where m is the maximum of the tile. scale_weights turns it into
      the gradient, when the gradient of the loss is known.
    """
    row = first + tl.arange(0, ROWS)
    word = tile * WORDS + tl.arange(0, WORDS)
    inside, real = row < rows, word < vocabulary
    if bias is not None:
        x += tl.load(bias + word, mask=real, other=0.0).to(tl.float32)[None, :]
    action = tl.load(actions + row, mask=inside, other=0).to(tl.int32)
    x_action = tl.sum(tl.where(word[None, :] == action[:, None], x, 0.0), 1)
    if SOFTCAP:
        x, slope = capped(x, softcap)
    temperature = temperature_at(temperatures, row, inside, temperature) + tl.zeros([ROWS], tl.float32)
    if GRADIENT:
        scale = inverse_of(temperature)
        top = tl.load(row_max + row, mask=inside, other=0.0)
        log_total = tl.load(log_sum + row, mask=inside, other=0.0)
        d_q, d_v = tl.load(dq + row, mask=inside, other=0.0), tl.load(dv + row, mask=inside, other=0.0)
        d_log = tl.load(dlog_prob + row, mask=inside, other=0.0)
        if SOFTCAP:
            x_action = capped(x_action, softcap)[0]
        log_pi = (x_action * scale - top) - log_total
        at_action = action_gradient(log_pi, d_q, d_v, d_log)
        share = tl.exp2(-log_total * LOG2E) * scale
        below = x * scale[:, None] - top[:, None]
        if dentropy is not None:
            h = tl.load(entropy + row, mask=inside, other=0.0)
            d_entropy = tl.load(dentropy + row, mask=inside, other=0.0)
            at_action -= d_entropy * tl.exp2(log_pi * LOG2E) * (tl.maximum(log_pi, -1000.0) + h)
            spread = (d_entropy * share)[:, None] * (tl.maximum(below, -1000.0) + (h - log_total)[:, None])
            g = tl.exp2(below * LOG2E) * (((d_v - d_log) * share)[:, None] - spread)
        else:
            g = tl.exp2(below * LOG2E) * ((d_v - d_log) * share)[:, None]
        g = tl.where(word[None, :] == action[:, None], (at_action * scale)[:, None], g)
    else:
        x = tl.where(real[None, :], x, float("-inf"))  # after the softcap, which makes -inf finite
        m = tl.maximum(tl.max(x, 1), LOWEST)
        below = x - m[:, None]
        g = tl.exp2(below * exponent_of(temperature)[:, None])
        top = below == 0
        count = tl.sum(top.to(tl.float32), 1)
        at = parts + row.to(tl.int64) * tiles + tile
        plane = tl.cast(rows, tl.int64) * tiles
        tl.store(at, m, mask=inside)
        # s leaves out one of the entries at the maximum. A tile with only -inf has no such entry: there s is -1.
        others = count - (m >= LOWEST).to(tl.float32)  # always count - 1; written so, sm_80 and sm_120 spill registers
        tl.store(at + plane, tl.sum(tl.where(top, 0.0, g), 1) + others, mask=inside)
        if ENTROPY:
            tl.store(at + 2 * plane, tl.sum(g * tl.maximum(below, LOWEST), 1), mask=inside)
        tl.store(at + 3 * plane, x_action, mask=inside)
    if out is not None:
        if SOFTCAP:
            g = g * slope
        at = out + row.to(tl.int64)[:, None] * stride_out + word[None, :]
        tl.store(at, g.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def scale_weights(
    weights,
    parts,
    actions,
    temperatures,
    row_max,
    log_sum,
    dq,
    dv,
    dlog_prob,
    rows,
    vocabulary,
    tiles,
    blocks,
    stride_weights,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    WORDS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Turn the weights [M, V] of finish_tile into the gradient of the logits, in place.

    Program (n, k) takes `blocks` blocks of row n, the k-th such run. A block is TILES tiles of WORDS words. All words
    of a tile have the factor exp((m - max) / T) / sum * (dv - dlog_prob) / T; the action has the exact gradient.
    """
    token = tl.program_id(0).to(tl.int64)
    row = weights + token * stride_weights
    plane = tl.cast(rows, tl.int64) * tiles
    at_parts = parts + token * tiles
    scale = inverse_of(temperature_at(temperatures, token, True, temperature))
    top, log_total = tl.load(row_max + token), tl.load(log_sum + token)
    d_q, d_v, d_log = tl.load(dq + token), tl.load(dv + token), tl.load(dlog_prob + token)
    action = tl.load(actions + token).to(tl.int32)
    x_action = tl.load(at_parts + 3 * plane + action // WORDS)
    slope = scale
    if SOFTCAP:
        x_action, slope = capped(x_action, softcap)
        slope = slope * scale
    at_action = action_gradient((x_action * scale - top) - log_total, d_q, d_v, d_log) * slope
    d_all = (d_v - d_log) * tl.exp2(-log_total * LOG2E) * scale
    for block in range(tl.program_id(1) * blocks, (tl.program_id(1) + 1) * blocks):
        tile = block * TILES + tl.arange(0, TILES)
        m = tl.load(at_parts + tile, mask=tile < tiles, other=LOWEST)
        factor = tl.exp2((m * scale - top) * LOG2E) * d_all
        word = tile[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
        g = tl.load(row + word, mask=word < vocabulary, other=0.0).to(tl.float32) * factor[:, None]
        g = tl.where(word == action, at_action, g)
        tl.store(row + word, g.to(weights.dtype.element_ty), mask=word < vocabulary)
