"""Attention over a prefix tree: each token sees itself and the tokens on its path from the root.

transformers calls `tree_attention` in place of the model's own attention while `attention_for(model, tree)` is entered.
The layers pass the argument `layout` on to it. It does what every plain causal attention does, and refuses all else.

Letters in shapes: N tokens of the tree, h heads (of queries; keys may have fewer), d their width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from ..batching import PrefixTree, on_device

NAME = "reval_tree"
"""The name of `tree_attention` in transformers. No mask has this name, so the models make none."""
BLOCK = 128
"""Runs of the tree are joined to blocks of about this many tokens. Larger blocks compute more pairs of tokens that do
not see each other, smaller ones need more calls."""
FLEX = 128
"""The width of FlexAttention's blocks: its default."""
MEANINGLESS = {"position_ids", "use_cache", "cache_position", "past_key_values", "layout"}
"""Arguments of attention functions that change nothing here."""


class Block(NamedTuple):
    """Neighbours in the tree whose queries are computed by one call."""

    path: tuple[int, ...]
    """Runs before the block that all of its tokens see."""
    own: range
    """The runs of the block."""
    mask: Tensor | None
    """bool [queries, keys], with the keys of `path` first. None: causal."""
    lead: bool
    """Compute the queries of `path` again, so that queries and keys are the same tokens."""


@dataclass
class Layout:
    """What `tree_attention` knows of the tree."""

    depth: int
    """The number of tokens of the longest path."""
    sizes: list[int] = field(default_factory=list)
    """The tokens of each run."""
    blocks: list[Block] = field(default_factory=list)
    block_mask: Any = None
    """On a GPU: the BlockMask of FlexAttention, in place of the blocks, whose many small calls keep a GPU waiting."""
    calls: int = 0
    """How often an attention has used this layout."""


def layout_of(tree: PrefixTree, device: torch.device) -> Layout:
    """What `tree_attention` needs to compute with tokens of this tree on this device."""
    if device.type == "cuda":
        return Layout(tree.depth, block_mask=block_mask_of(tree.ends, device))
    sizes = np.diff([*tree.runs, len(tree.ends)])
    return Layout(tree.depth, sizes.tolist(), list(_blocks(tree, sizes, device)))


def _blocks(tree: PrefixTree, sizes: np.ndarray, device: torch.device) -> Iterator[Block]:
    starts, ends = tree.runs.tolist(), tree.ends
    stack: list[int] = []  # the runs on the path to the current run
    first, tokens = 0, 0
    path: tuple[int, ...] = ()
    for run, start in enumerate(starts):
        while stack and ends[starts[stack[-1]]] <= start:
            stack.pop()
        if run > first and tokens + sizes[run] > BLOCK:
            yield _block(tree, sizes, path, range(first, run), device)
            first, tokens = run, 0
        if run == first:
            path = tuple(stack)
        tokens += sizes[run]
        stack.append(run)
    yield _block(tree, sizes, path, range(first, len(starts)), device)


def _block(tree: PrefixTree, sizes: np.ndarray, path: tuple[int, ...], own: range, device: torch.device) -> Block:
    before, queries = int(sizes[list(path)].sum()), int(sizes[own.start : own.stop].sum())
    if len(own) == 1 and before <= queries:
        return Block(path, own, None, lead=before > 0)
    where = [np.arange(tree.runs[run], tree.runs[run] + sizes[run]) for run in (*path, *own)]
    keys = np.concatenate(where)
    q = keys[before:, None]
    return Block(path, own, torch.from_numpy((keys <= q) & (q < tree.ends[keys])).to(device), lead=False)


def block_mask_of(ends: np.ndarray, device: torch.device) -> Any:
    """The BlockMask of FlexAttention, which says which squares of FLEX x FLEX pairs of tokens it must compute.

    torch's `create_block_mask` looks at all N x N pairs. This needs only the largest and the smallest end of each block
    of keys, and the device is not waited for.
    """
    from torch.nn.attention.flex_attention import BlockMask

    count = len(ends)
    rows = np.arange(-(-count // FLEX))[:, None]  # blocks of queries; the blocks of keys are the columns
    padded = np.pad(ends, (0, -count % FLEX))
    largest, smallest = padded.reshape(-1, FLEX).max(1), padded.reshape(-1, FLEX).min(1)
    whole = (rows > rows.T) & (smallest >= (rows + 1) * FLEX)  # no pair needs the mask
    partial = (rows >= rows.T) & (largest > rows * FLEX) & ~whole
    parts = []
    for blocks in (partial, whole):
        order = np.argsort(~blocks, axis=1, kind="stable")  # the blocks to compute come first
        parts += [x.astype(np.int32)[None, None] for x in (blocks.sum(1), order)]
    counts, indices, whole_counts, whole_indices, last = (
        on_device(torch.from_numpy(x), device) for x in (*parts, ends)
    )
    return BlockMask.from_kv_blocks(
        counts, indices, whole_counts, whole_indices, FLEX, mask_mod=sees(last), seq_lengths=(count, count)
    )


def sees(ends: Tensor) -> Any:
    """The mask of FlexAttention: token q of the tree sees token k."""

    def mask(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < ends[k])

    return mask


def _check_plain(layout: Layout, options: dict[str, Any]) -> None:
    """Raise NotImplementedError if a model asks its attention for more than plain causal attention."""
    for name, value in options.items():
        wide = name == "sliding_window" and value and layout.depth <= value
        absent = value is None or (value is False and name != "is_causal") or (value is True and name == "is_causal")
        if not (absent or wide or name in MEANINGLESS):
            raise NotImplementedError(
                f"its attention has {name}={type(value).__name__ if isinstance(value, Tensor) else value}"
            )


@torch.compiler.disable
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls: query [1, h, N, d], key and value [1, h', N, d] -> [1, N, h, d].

    `torch.compile` would compile it again for every tree.
    """
    _check_plain(layout, options | {"dropout": dropout or None, "attention_mask": attention_mask})
    layout.calls += 1
    if layout.block_mask is not None:
        return _flex(query, key, value, layout.block_mask, scaling).transpose(1, 2), None
    q, k, v = (x.split(layout.sizes, 2) for x in (query, key, value))
    out = []
    for path, own, mask, lead in layout.blocks:
        runs = (*path, *own)
        queries, keys, values = (
            _join([x[i] for i in of]) for x, of in ((q, runs if lead else own), (k, runs), (v, runs))
        )
        part = scaled_dot_product_attention(
            queries, keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=key.shape[1] < query.shape[1]
        )
        out.append(part[:, :, -sum(layout.sizes[i] for i in own) :] if lead else part)
    return _join(out).transpose(1, 2), None


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _flex(query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scaling: float | None) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if torch.is_autocast_enabled(query.device.type):  # older versions of torch do not do this for FlexAttention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    global _compiled
    _compiled = _compiled or torch.compile(flex_attention, dynamic=True)
    return _compiled(query, key, value, block_mask=block_mask, scale=scaling, enable_gqa=key.shape[1] < query.shape[1])


_compiled: Any = None
AttentionInterface.register(NAME, tree_attention)


@contextmanager
def attention_for(model: PreTrainedModel, tree: PrefixTree | None) -> Iterator[None]:
    """Within the block the layers of `model` compute with tokens of `tree`: they call `tree_attention`. Without a tree
    they keep their own attention.

    A backward pass that recomputes layers (gradient checkpointing) must be in the block too.
    """
    if tree is None:
        yield
        return
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    before = [(c, c._attn_implementation) for c in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
