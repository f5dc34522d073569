"""Token values and losses from hidden states and the head. Logits are never rounded to bf16 or stored as a whole.

One kernel, `linear_forward`, computes all logits. A program computes one tile of logits as an fp32 accumulator of a
tensor-core product. For each token of the tile it writes the part (see common.py) of the tile's words. `merge_parts`
joins the parts of a token in a fixed order. If the gradient needs the logits, the kernel also stores them, a chunk of
tokens at a time. So the numbers of a token depend neither on the caller nor on the number of tokens in the call. This
has two effects. A policy equal to its reference has loss exactly 0. And logits that are computed again are the same to
the bit; otherwise the gradient of a confident state would be noise.

With gradient, the drivers of chunks.py cut the tokens into chunks, of whole trajectories where possible. `row_backward`
of rows.py turns the logits of a chunk into their gradient. torch's matmuls turn that into the gradients of hidden and
weight. The cost is 6 N V D operations if the loss is known for each trajectory (`linear_reval_loss`), 4 N V D if the
head is also frozen, and 8 N V D if the upstream gradient comes later. Masked tokens cost nothing.

Letters: N tokens, M of them unmasked, V words of the vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...contract import (
    BellmanOptions,
    Cotangents,
    HeadGradients,
    HeadInputs,
    Layout,
    LossAndGradients,
    Needs,
    Reference,
    RowValues,
    Statistics,
    Tokens,
    Transform,
    keeps_wide_gradients,
)
from .. import gpu, portable
from ..chunks import ChunkedHead, recompute_gradients, values_by_chunks, whole_trajectory_loss
from ..tokens import Index
from . import rows
from .bellman import bellman_loss
from .common import (
    LOWEST,
    capped,
    exponent_of,
    launch,
    merge_parts,
    new_values,
    temperature_at,
    temperatures,
)

GROUP = 16  # blocks of tokens that share one pass over the head


@triton.jit
def linear_forward(
    hidden,
    weight,
    bias,
    index,
    actions,
    temperatures,
    logits,
    parts,
    rows,
    vocabulary,
    width,
    stride_token,
    stride_hidden,
    stride_word,
    stride_weight,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of logits: ROWS unmasked tokens, whose positions are in `index` [M], times WORDS words.

    Writes logits [M, V] in fp32, and parts [4, M, tiles]. Either of them may be None.
    """
    # GROUP blocks of tokens go through the vocabulary together. Their hidden states stay in the L2 cache, and the head
    # is read from memory once per group.
    tiles = tl.cdiv(vocabulary, WORDS)
    group = tl.program_id(0) // (GROUP * tiles)
    size = tl.minimum(GROUP, tl.cdiv(rows, ROWS) - group * GROUP)
    place = tl.program_id(0) - group * GROUP * tiles
    tile = place // size
    row = (group * GROUP + place % size) * ROWS + tl.arange(0, ROWS)
    word = tile * WORDS + tl.arange(0, WORDS)
    inside, real = row < rows, word < vocabulary
    token = tl.load(index + row, mask=inside, other=0)
    # Past the end of the vocabulary the last word is read again, which costs less than a mask. Its result is discarded.
    there = tl.minimum(word, vocabulary - 1).to(tl.int64)

    depth = tl.arange(0, DEPTH)
    hidden_at = hidden + token[:, None] * stride_token + depth.to(tl.int64)[None, :] * stride_hidden
    weight_at = weight + there[None, :] * stride_word + depth.to(tl.int64)[:, None] * stride_weight
    x = tl.zeros([ROWS, WORDS], tl.float32)
    for d in range(0, width, DEPTH):
        step = tl.cast(d, tl.int64)
        if EVEN:
            h = tl.load(hidden_at + step * stride_hidden)
            w = tl.load(weight_at + step * stride_weight)
        else:
            h = tl.load(hidden_at + step * stride_hidden, mask=(d + depth < width)[None, :], other=0.0)
            w = tl.load(weight_at + step * stride_weight, mask=(d + depth < width)[:, None], other=0.0)
        x = tl.dot(h, w, x, input_precision="ieee")
    if bias is not None:
        x += tl.load(bias + there).to(tl.float32)[None, :]
    if logits is not None:
        at = logits + row.to(tl.int64)[:, None] * vocabulary + word[None, :]
        tl.store(at, x, mask=inside[:, None] & real[None, :])
    if parts is not None:
        if SOFTCAP:
            x, _ = capped(x, softcap)
        x = tl.where(real[None, :], x, float("-inf"))  # after the softcap, which makes -inf finite
        action = tl.load(actions + row, mask=inside, other=0)
        temperature = temperature_at(temperatures, row, inside, temperature) + tl.zeros([ROWS], tl.float32)
        m = tl.maximum(tl.max(x, 1), LOWEST)
        below = x - m[:, None]
        p = tl.exp2(below * exponent_of(temperature)[:, None])
        top = below == 0
        count = tl.sum(top.to(tl.float32), 1)
        at = parts + row.to(tl.int64) * tiles + tile
        plane = tl.cast(rows, tl.int64) * tiles
        tl.store(at, m, mask=inside)
        # s leaves out one of the entries at the maximum. A tile with only -inf has no such entry: there s is -1.
        others = count - (m >= LOWEST).to(tl.float32)  # always count - 1; written so, sm_80 and sm_120 spill registers
        tl.store(at + plane, tl.sum(tl.where(top, 0.0, p), 1) + others, mask=inside)
        if ENTROPY:
            tl.store(at + 2 * plane, tl.sum(p * tl.maximum(below, LOWEST), 1), mask=inside)
        tl.store(at + 3 * plane, tl.sum(tl.where(word[None, :] == action[:, None], x, 0.0), 1), mask=inside)


# --- launchers ------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """The shape of one program's tile of logits, and the compile options."""

    rows: int
    words: int
    depth: int
    warps: int
    stages: int

    def constants(self, width: int) -> dict[str, Any]:
        return {
            "EVEN": width % self.depth == 0,
            "ROWS": self.rows,
            "WORDS": self.words,
            "DEPTH": self.depth,
            "GROUP": GROUP,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tile(dtype: torch.dtype, shared: int) -> Tile:
    """The tile for operands of this dtype, if a block may use `shared` bytes of shared memory (docs/kernels.md)."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 2)
    # 256 words a tile would halve the reads of hidden states, but the epilogue would spill registers
    return Tile(128, 128, 64, 8, 4 if shared > 160 * 1024 else 3 if shared > 96 * 1024 else 2)


def fitted_tile(hidden: Tensor, weight: Tensor) -> Tile:
    """The tile, no larger than the head needs. The number of tokens must not change it: the bits would change too."""
    shape = tile(hidden.dtype, _shared_memory(hidden.device))
    words, depth = (
        min(most, max(16, triton.next_power_of_2(size)))  # tl.dot needs at least 16
        for most, size in zip(shape[1:3], weight.shape, strict=True)
    )
    return Tile(shape.rows, words, depth, shape.warps if words >= 64 else 4, shape.stages)


def linear_token_values(
    head: HeadInputs, tokens: Tokens, transform: Transform, with_entropy: bool, with_expected: bool
) -> tuple[RowValues, Tensor]:
    """See Backend.linear_token_values. Without `with_expected` no logits are stored."""
    hidden, weight, _ = head
    if with_expected:
        chunked = _chunked(head, Needs(True, False, False), wide=True)
        return values_by_chunks(chunked, tokens, transform, with_entropy)
    if not _takes(head):
        return portable.linear_token_values(head, tokens, transform, with_entropy, False)
    out = new_values(hidden, tokens.mask)
    index = _unmasked(tokens)
    _forward(
        head._replace(hidden=hidden.reshape(-1, hidden.shape[-1])),
        index,
        tokens.actions.reshape(-1)[index],
        transform.flattened().at((index,)),
        with_entropy,
        None,
        out,
    )
    return out, out.q.new_empty(0)


def _forward(
    head: HeadInputs,
    index: Tensor,
    actions: Tensor,
    transform: Transform,
    with_entropy: bool,
    logits: Tensor | None,
    out: RowValues | None,
) -> None:
    """Launch the kernel for the tokens at `index` [M] of hidden [N, D]. Actions and temperatures are [M].

    Writes logits [M, V] and the values `out`. Either of them may be None.
    """
    hidden, weight, bias = head
    rows, (vocabulary, width) = len(index), weight.shape
    if rows == 0:
        return
    shape = fitted_tile(hidden, weight)
    blocks, tiles = triton.cdiv(rows, shape.rows), triton.cdiv(vocabulary, shape.words)
    parts = None if out is None else hidden.new_empty(4, rows, tiles, dtype=torch.float32)
    per_token, temperature = temperatures(transform)
    launch(
        linear_forward,
        (blocks * tiles,),
        hidden,
        weight,
        bias,
        index,
        actions.contiguous(),
        per_token,
        logits,
        parts,
        rows,
        vocabulary,
        width,
        *hidden.stride(),
        *weight.stride(),
        temperature,
        transform.softcap or 1.0,
        SOFTCAP=transform.softcap is not None,
        ENTROPY=with_entropy,
        **shape.constants(width),
    )
    if out is not None and parts is not None:
        merge_parts(parts, index, None, transform, with_entropy, out)


def linear_token_values_backward(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    needs: Needs,
) -> HeadGradients:
    """See Backend.linear_token_values_backward. The logits are computed again by chunks."""
    return recompute_gradients(_chunked(head, needs), tokens, transform, statistics, cotangents)


def linear_reval_loss(
    head: HeadInputs,
    actions: Tensor,
    layout: Layout,
    transform: Transform,
    reference: Reference,
    rewards: Tensor,
    options: BellmanOptions,
    needs: Needs,
) -> LossAndGradients:
    """See Backend.linear_reval_loss.

    The trajectories of a chunk have at most LINEAR_CHUNK // V actions together. A single longer trajectory has its
    logits computed twice (8 N V D operations).
    """
    shape = head.hidden.shape
    flat = head._replace(hidden=head.hidden.reshape(-1, shape[-1]))
    chunked = _chunked(flat, needs, keeps_wide_gradients(head))
    return whole_trajectory_loss(chunked, shape, actions, layout, transform, reference, rewards, options)


class GPUChunkedHead(ChunkedHead):
    """One chunk on the GPU. Row kernels run between the matmuls, which take bf16 operands and give float32 results."""

    bellman_loss = staticmethod(bellman_loss)

    @property
    def size(self) -> int:
        return max(1, gpu.LINEAR_CHUNK // len(self.weight))

    @property
    def narrow(self) -> bool:
        # AMD builds of torch have no matmul from bf16 to fp32: there ChunkedHead widens some words at a time
        return self.weight.dtype == torch.bfloat16 and torch.version.hip is None

    def logits(self, at: Index) -> Tensor:
        hidden = self.hidden[at]
        logits = torch.empty(len(hidden), len(self.weight), dtype=torch.float32, device=hidden.device)
        everything = torch.arange(len(hidden), device=hidden.device)
        head = HeadInputs(hidden, self.weight, self.bias)
        _forward(head, everything, everything, Transform(), False, logits, None)
        return logits

    def values(
        self, at: Index, actions: Tensor, transform: Transform, with_entropy: bool = False
    ) -> tuple[Tensor, RowValues]:
        hidden = self.hidden[at]
        logits = torch.empty(len(hidden), len(self.weight), dtype=torch.float32, device=hidden.device)
        everything = torch.arange(len(hidden), device=hidden.device)
        out = new_values(hidden, None)
        head = HeadInputs(hidden, self.weight, self.bias)
        _forward(head, everything, actions, transform, with_entropy, logits, out)
        return logits, out

    def add_gradient_(
        self,
        at: Index,
        logits: Tensor,
        actions: Tensor,
        transform: Transform,
        statistics: Statistics,
        cotangents: Cotangents,
    ) -> None:
        narrow = self.narrow and not self.needs.needs_bias
        dlogits = torch.empty_like(logits, dtype=torch.bfloat16) if narrow else logits
        strides = (len(logits), 0, logits.stride(0))  # one block of consecutive rows: see two_strides
        rows.backward(logits, strides, dlogits, Tokens(actions, None), transform, statistics, cotangents)
        self.add_dlogits(at, dlogits)

    def add_dlogits(self, at: Index, dlogits: Tensor) -> None:
        """With a bf16 weight the matmuls take bf16 operands. The bias gradient is summed before dlogits are rounded.
        fp16 operands are widened to fp32, because in fp16 the p of a rare word would be 0."""
        if not self.narrow:
            return super().add_dlogits(at, dlogits)
        if self.needs.needs_bias:
            self.d_bias += dlogits.sum(0)
        dlogits = dlogits.bfloat16()
        if self.needs.needs_hidden:
            self.d_hidden[at] = _product(dlogits, self.weight).to(self.d_hidden.dtype)
        if self.needs.needs_weight:
            _add_product_(self.d_weight, dlogits.T, self.hidden[at])
        return None


def _chunked(head: HeadInputs, needs: Needs, wide: bool = False) -> ChunkedHead:
    kind = GPUChunkedHead if _takes(head) else ChunkedHead
    return kind(head, needs, wide)


def _takes(head: HeadInputs) -> bool:
    """Whether the kernel takes these operands: hidden and weight of the same dtype, which is not float64."""
    hidden, weight, _ = head
    return hidden.dtype == weight.dtype and hidden.dtype != torch.float64 and hidden.shape[-1] > 0


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a tensor for the product."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _unmasked(tokens: Tokens) -> Tensor:
    """Flat indices [M] of the unmasked tokens. With a mask the CPU waits for the GPU here: the grid depends on M."""
    actions, mask = tokens
    if mask is None:
        return torch.arange(actions.numel(), device=actions.device)
    return mask.reshape(-1).nonzero()[:, 0]


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use. Without a GPU: the number of an H100."""
    if device.type != "cuda":
        return 227 * 1024
    if torch.version.hip is not None:
        return 64 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # torch's type stub lacks the next name
    return properties.shared_memory_per_block_optin
