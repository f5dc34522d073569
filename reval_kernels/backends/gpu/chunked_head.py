"""One chunk of tokens on a GPU: values, the gradient of the logits, and the matmuls that follow.

`linear_reval_loss` and a frozen head know the gradient of a chunk's loss right after its values. So the kernel that
computes the values also writes the weights of the words, and scale_weights turns the weights into the gradient of the
logits, in place. Where the gradient of the loss is known before, one kernel computes the logits again and writes their
gradient. torch's matmuls turn that into the gradients of hidden states and head.

With operands in bf16, a chunk has 2 bytes for each token and word: written, then read and overwritten.

Letters: C tokens of the chunk, V words, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ...contract import Cotangents, HeadInputs, Needs, RowValues, Statistics, Transform
from .. import gpu
from ..chunks import ChunkedHead
from ..tokens import Index
from .bellman import bellman_loss
from .common import launch, new_values, temperatures
from .linear_kernels import scale_weights
from .linear_launch import compute_gradient, compute_values, fitted_tile
from .operands import operands

BLOCK = 4096
"""Words that a program of scale_weights takes at a time, as in rows.py."""
Kept = tuple[Tensor, Tensor]
"""The weights [C, V] of the words, and the parts [4, C, tiles] that hold the maximum of each tile."""


class GPUChunkedHead(ChunkedHead):
    """See ChunkedHead. The matmuls take operands in the dtype `operand`, and sum in float32."""

    bellman_loss = staticmethod(bellman_loss)

    def __init__(self, head: HeadInputs, needs: Needs, wide: bool = False):
        super().__init__(head, needs, wide)
        self.tiles = operands(head)
        # In fp16 the p of a rare word would be 0. AMD builds of torch have no matmul from bf16 to fp32. And the
        # gradient of the bias is summed before anything is rounded.
        narrow = self.tiles.weight.dtype == torch.bfloat16 and torch.version.hip is None and not needs.needs_bias
        self.operand = torch.bfloat16 if narrow else torch.float32

    @property
    def size(self) -> int:
        """Tokens of one chunk: all of them, if their weights fit into the memory of a chunk and of the float32 sum that
        a single chunk does not need."""
        chunk, token = 2 * gpu.LINEAR_CHUNK, len(self.weight) * self.operand.itemsize
        adds_up = self.needs.needs_weight and not self.wide and self.operand == torch.bfloat16
        tokens, spared = self.hidden.numel() // self.hidden.shape[-1], 4 * self.weight.numel() if adds_up else 0
        return max(1, tokens if tokens * token <= chunk + spared else chunk // token)

    def values(
        self, at: Index, actions: Tensor, transform: Transform, with_entropy: bool = False, keep: bool = False
    ) -> tuple[Kept | None, RowValues]:
        head = self.tiles._replace(hidden=self.tiles.hidden[at])
        out = new_values(head.hidden, None)
        weights = self._new_chunk(head.hidden) if keep else None
        parts = compute_values(head, actions, transform, with_entropy, weights, None, out)
        return None if weights is None else (weights, parts), out

    def add_gradient_(
        self,
        at: Index,
        kept: Kept | None,
        actions: Tensor,
        transform: Transform,
        statistics: Statistics,
        cotangents: Cotangents,
    ) -> None:
        if kept is None or cotangents.dentropy is not None:
            head = self.tiles._replace(hidden=self.tiles.hidden[at])
            dlogits = self._new_chunk(head.hidden)
            compute_gradient(head, actions, transform, statistics, cotangents, dlogits)
        else:
            dlogits, parts = kept
            words = fitted_tile(self.tiles.weight, transform.softcap is not None).words
            _scale_weights_(dlogits, parts, words, actions, transform, statistics, cotangents)
        self.add_dlogits(at, dlogits)

    def _new_chunk(self, hidden: Tensor) -> Tensor:
        """An uninitialised tensor [C, V]. Its rows are 16-byte aligned, as wide loads and matmuls want them."""
        vocabulary = len(self.weight)
        padded = triton.cdiv(vocabulary, 8) * 8
        return torch.empty(len(hidden), padded, dtype=self.operand, device=hidden.device)[:, :vocabulary]

    def add_dlogits(self, at: Index, dlogits: Tensor) -> None:
        if self.operand == torch.float32:
            with _tf32(self.tiles.precision == "tf32"):
                return super().add_dlogits(at, dlogits)
        width = self.hidden.shape[-1]  # of "bf16x3", the gradients take the high parts, which come first
        if self.needs.needs_hidden:
            self.d_hidden[at] = _product(dlogits, self.tiles.weight[:, :width], self.d_hidden.dtype)
        if self.needs.needs_weight:
            self.d_weight = self._with_product(self.d_weight, dlogits.T, self.tiles.hidden[at][:, :width])
        return None

    def _with_product(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """total + a @ b. The only chunk of all gives the weight's gradient in its own dtype, rounded once."""
        if total is None:
            return _product(a, b, torch.float32 if self.wide or not self.single else self.weight.dtype)
        if total.device.type == "cuda":
            return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return total.addmm_(a.float(), b.float())


def _scale_weights_(
    weights: Tensor,
    parts: Tensor,
    words: int,
    actions: Tensor,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
) -> None:
    """Overwrite the weights [C, V] with the gradient of the logits. A tile has `words` words. The other tensors but the
    parts are [C]."""
    rows, vocabulary = weights.shape
    if rows == 0:
        return
    tiles = parts.shape[2]
    together = min(BLOCK // words, triton.next_power_of_2(tiles))
    blocks = triton.cdiv(tiles, together)
    each = triton.cdiv(blocks, triton.cdiv(blocks, 16))
    per_token, temperature = temperatures(transform)
    launch(
        scale_weights,
        (rows, triton.cdiv(blocks, each)),
        weights,
        parts,
        actions.contiguous(),
        per_token,
        *(x.contiguous() for x in (*statistics[:2], *cotangents[:3])),
        rows,
        vocabulary,
        tiles,
        each,
        weights.stride(0),
        temperature,
        transform.softcap or 1.0,
        SOFTCAP=transform.softcap is not None,
        WORDS=words,
        TILES=together,
        num_warps=max(1, min(8, together * words // 512)),
    )


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of bf16 operands, summed in fp32 and rounded once to `dtype`."""
    if a.device.type != "cuda":
        return torch.mm(a.float(), b.float()).to(dtype)
    if dtype != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    with _sums_in_float32():
        return torch.mm(a, b)


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """In this context, if `allowed`, torch's float32 matmuls may round their operands to TF32."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if allowed:
            torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _sums_in_float32() -> Iterator[None]:
    """cuBLAS may cut a long sum into pieces. In this context it must not round the pieces to bf16."""
    settings: Any = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    settings.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
