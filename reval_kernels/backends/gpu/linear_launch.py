"""The launches of the kernels of linear_kernels.py: which of them, and the shape of their tiles.

Both follow from the device and the head alone, never from the tokens of the call: see linear.py.

Letters: M tokens, V words of the vocabulary, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...contract import Cotangents, HeadInputs, RowValues, Statistics, Transform
from .common import launch, merge_parts, temperatures
from .linear_kernels import linear_tiles, linear_tiles_tma

GROUP = 16  # blocks of tokens that share one pass over the head


class Tile(NamedTuple):
    """The shape of one program's tile of logits, and the compile options."""

    rows: int
    words: int
    depth: int
    warps: int
    stages: int

    @property
    def constants(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "WORDS": self.words,
            "DEPTH": self.depth,
            "GROUP": GROUP,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def tma_tile(softcap: bool) -> Tile:
    """The tile of linear_tiles_tma. Two programs of 4 warps fit on a processor: one computes while the other finishes
    its tile. The arithmetic of a softcap needs the registers of 8 warps."""
    return Tile(128, 128, 64, 8 if softcap else 4, 3)


def tile(dtype: torch.dtype, shared: int) -> Tile:
    """The tile of linear_tiles for operands of this dtype, if a block may use `shared` bytes of shared memory
    (docs/kernels.md)."""
    if dtype == torch.float32:
        return Tile(64, 64, 32, 4, 2)
    # 256 words a tile would halve the reads of hidden states, but finish_tile would spill registers
    return Tile(128, 128, 64, 8, 4 if shared > 160 * 1024 else 3 if shared > 96 * 1024 else 2)


def fitted_tile(weight: Tensor, softcap: bool) -> Tile:
    """The tile, no larger than the head needs. The number of tokens must not change it: the bits would change too."""
    shape = tma_tile(softcap) if uses_tma(weight) else tile(weight.dtype, _shared_memory(weight.device))
    words, depth = (
        min(most, max(16, triton.next_power_of_2(size)))  # tl.dot needs at least 16
        for most, size in zip(shape[1:3], weight.shape, strict=True)
    )
    return Tile(shape.rows, words, depth, shape.warps if words >= 64 else 4, shape.stages)


def uses_tma(weight: Tensor) -> bool:
    """Whether descriptors can describe this head, on a GPU that has them. The hidden states have no say: the numbers
    of a token must not depend on how the caller stores them."""
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) * weight.itemsize % 16 == 0
    return weight.itemsize == 2 and weight.stride(1) == 1 and aligned and _has_tma(weight.device)


def _has_tma(device: torch.device) -> bool:
    """Hopper and Blackwell with large shared memory. Without a GPU: as on an H100."""
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def compute_values(
    head: HeadInputs,
    actions: Tensor,
    transform: Transform,
    with_entropy: bool,
    weights: Tensor | None,
    index: Tensor | None,
    out: RowValues,
) -> Tensor:
    """The values of hidden [M, D] to positions `index` [M] of `out` (None: 0 to M - 1), and the weights of the words to
    `weights` [M, V], unless it is None. Returns the parts [4, M, tiles], which scale_weights needs. Actions and
    temperatures are [M]."""
    rows, shape = len(actions), fitted_tile(head.weight, transform.softcap is not None)
    parts = head.hidden.new_empty(4, rows, triton.cdiv(len(head.weight), shape.words), dtype=torch.float32)
    if rows:
        _launch_tiles(head, actions, transform, shape, parts, weights, None, None, with_entropy)
        merge_parts(parts, index, None, transform, with_entropy, out)
    return parts


def compute_gradient(
    head: HeadInputs,
    actions: Tensor,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    out: Tensor,
) -> None:
    """Write the gradient of the logits of hidden [M, D] to `out` [M, V]. The other tensors are [M]."""
    if len(actions):
        shape = fitted_tile(head.weight, transform.softcap is not None)
        _launch_tiles(head, actions, transform, shape, None, out, statistics, cotangents, False)


def _launch_tiles(
    head: HeadInputs,
    actions: Tensor,
    transform: Transform,
    shape: Tile,
    parts: Tensor | None,
    out: Tensor | None,
    statistics: Statistics | None,
    cotangents: Cotangents | None,
    with_entropy: bool,
) -> None:
    """Launch one of the two kernels; with statistics and cotangents, for the gradient of the logits."""
    hidden, weight, bias = head.tensors
    rows, (vocabulary, width) = len(actions), weight.shape
    per_token, temperature = temperatures(transform)
    tiles = triton.cdiv(rows, shape.rows) * triton.cdiv(vocabulary, shape.words)
    given: tuple[Tensor | None, ...] = (*(statistics or (None,) * 3), *(cotangents or (None,) * 4))
    common = (
        bias,
        actions.contiguous(),
        per_token,
        parts,
        out,
        *(None if x is None else x.contiguous() for x in given),
        rows,
        vocabulary,
        width,
    )
    stride_out = 0 if out is None else out.stride(0)
    constants = {
        "SOFTCAP": transform.softcap is not None,
        "ENTROPY": with_entropy,
        "GRADIENT": cotangents is not None,
        **shape.constants,
    }
    softcap = transform.softcap or 1.0
    if uses_tma(weight):
        hidden = _aligned(hidden)
        programs = min(tiles, 2 * _processors(weight.device))
        launch(
            linear_tiles_tma,
            (programs,),
            TensorDescriptor.from_tensor(hidden, [shape.rows, shape.depth]),
            TensorDescriptor.from_tensor(weight, [shape.words, shape.depth]),
            *common,
            stride_out,
            temperature,
            softcap,
            PROGRAMS=2 * _processors(weight.device),
            **constants,
        )
    else:
        launch(
            linear_tiles,
            (tiles,),
            hidden,
            weight,
            *common,
            *hidden.stride(),
            *weight.stride(),
            stride_out,
            temperature,
            softcap,
            PRECISION="tf32"
            if head.precision == "tf32" and weight.dtype == torch.float32 and not _is_amd()
            else "ieee",
            EVEN=width % shape.depth == 0,
            **constants,
        )


def _aligned(hidden: Tensor) -> Tensor:
    """Hidden states [M, D] that a descriptor can describe: a copy where they are not."""
    strides = hidden.stride(1) == 1 and hidden.stride(0) * hidden.itemsize % 16 == 0 and hidden.stride(0) > 0
    return hidden if strides and hidden.data_ptr() % 16 == 0 else hidden.clone(memory_format=torch.contiguous_format)


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one block may use. Without a GPU: the number of an H100."""
    if device.type != "cuda":
        return 227 * 1024
    if torch.version.hip is not None:
        return 64 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # torch's type stub lacks the next name
    return properties.shared_memory_per_block_optin


def _is_amd() -> bool:
    return torch.version.hip is not None


def _processors(device: torch.device) -> int:
    """Processors (SMs) of the GPU. Without a GPU: few, so that a program of a test takes several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
