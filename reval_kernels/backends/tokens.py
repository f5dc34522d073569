"""Cut the unmasked tokens of a call into chunks, and put the results back in the tokens' positions.

Letters: `...` is [B, T] or [N], M unmasked tokens, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..contract import RowValues, Tokens, wide_dtype

Index = tuple[Tensor, ...]
"""Positions of tokens: one index tensor [C] for each of the dimensions `...`."""


def unmasked(tokens: Tokens) -> tuple[Index, Tensor]:
    """The positions of the unmasked tokens, and their actions [M] as int64."""
    actions, mask = tokens
    rows = (torch.ones_like(actions, dtype=torch.bool) if mask is None else mask).nonzero(as_tuple=True)
    return rows, actions[rows].long()


def chunks(rows: Index, size: int) -> Iterator[tuple[slice, Index]]:
    """Pieces of about equally many tokens, at most `size`: the slice of the unmasked tokens, and the positions among
    all tokens."""
    count = -(-len(rows[0]) // max(1, size))
    size = -(-len(rows[0]) // max(1, count))
    for start in range(0, len(rows[0]), max(1, size)):
        piece = slice(start, min(start + size, len(rows[0])))
        yield piece, tuple(index[piece] for index in rows)


def per_token(pieces: list[RowValues], rows: Index, like: Tensor) -> RowValues:
    """Join the numbers [C] of the pieces and put them in the tokens' positions [...]. Other positions are 0."""
    out = RowValues(*(like.new_zeros(like.shape[:-1], dtype=wide_dtype(like)) for _ in RowValues._fields))
    if pieces:
        for x, found in zip(out, zip(*pieces, strict=True), strict=True):
            x[rows] = torch.cat(found)
    return out


def widened(x: Tensor) -> Tensor:
    """The tensor in float32; a float64 tensor stays float64."""
    return x if x.dtype == torch.float64 else x.float()
