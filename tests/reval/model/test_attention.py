"""Attention over a prefix tree, against a plain softmax with a dense mask, forward and backward.

The trees reach every kind of block: a shared root with many short branches (blocks of several runs), runs longer than a
block (with a path shorter and longer than themselves), single tokens, and trees without a common root.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from reval.batching import collate
from reval.model.attention import BLOCK, Layout, block_mask_of, layout_of, sees, tree_attention
from reval.replay import Trajectory

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def tree_of(lengths: list[tuple[int, ...]]):
    """The tree of sequences: (5, 3, 4) is a sequence with 5 + 3 + 4 tokens, of which it shares the 5 with (5, 2) and
    the 8 with (5, 3, 7)."""
    stored: dict[tuple[int, ...], np.ndarray] = {}
    out = []
    for key in lengths:
        parts = [stored.setdefault(key[: i + 1], RNG.integers(0, 1000, key[i])) for i in range(len(key))]
        ids = np.concatenate([*parts, [1]])
        mask = np.arange(len(ids)) == len(ids) - 1
        out.append(Trajectory(token_ids=ids, action_mask=mask, reward=0.0, score=0.0, iteration=1))
    return collate(out, CPU).tree


TREES = {
    "one": [(7,)],
    "single token": [(1,)],
    "groups": [(20, p, r) for p in (3, 11, 30) for r in (1, 2, 9, 40)],
    "no common root": [(4, 2), (4, 3), (9,), (1,)],
    "long run after a short path": [(10, 2 * BLOCK), (10, 5), (10, 3)],
    "long run after a longer path": [
        (2 * BLOCK, BLOCK + 9),
        (2 * BLOCK, 5),
        (2 * BLOCK, 6, 2 * BLOCK),
        (2 * BLOCK, 6, 1),
    ],
}


def dense(query, key, value, tree, scaling):
    count, repeats = len(tree.ends), query.shape[1] // key.shape[1]
    q, k = torch.arange(count)[:, None], torch.arange(count)
    seen = (k <= q) & (q < torch.from_numpy(tree.ends)[k])
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def inputs(count):
    return [torch.randn(1, heads, count, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


@pytest.mark.parametrize("name", TREES)
def test_every_token_sees_its_path(name):
    tree = tree_of(TREES[name])
    tensors, by = inputs(len(tree.ends)), torch.randn(1, len(tree.ends), 4, 8, dtype=torch.float64)
    layout = layout_of(tree, CPU)
    got, _ = tree_attention(torch.nn.Module(), *tensors, None, layout=layout, scaling=0.3)
    expected = dense(*tensors, tree, 0.3)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad((out * by).sum(), tensors) for out in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", TREES)
def test_the_blocks_for_flex_attention_are_those_that_torch_finds(name):
    tree = tree_of(TREES[name])
    count = len(tree.ends)
    ours = block_mask_of(tree.ends, CPU)
    theirs = create_block_mask(sees(torch.from_numpy(tree.ends)), None, None, count, count, device="cpu")
    for part in ("kv", "full_kv", "q", "full_q"):
        counts = [getattr(mask, f"{part}_num_blocks").flatten().tolist() for mask in (ours, theirs)]
        assert counts[0] == counts[1], part
        found = [getattr(mask, f"{part}_indices").flatten(0, 2).tolist() for mask in (ours, theirs)]
        for size, row, expected in zip(counts[0], *found, strict=True):
            assert row[:size] == expected[:size], part


# Compiled for one tree only: Inductor's C++ for a third one does not compile (torch 2.13), and each takes minutes.
@pytest.mark.parametrize(
    ("name", "compiled"), [*((name, False) for name in TREES), pytest.param("groups", True, marks=pytest.mark.slow)]
)
def test_flex_attention_sees_the_same(name, compiled):
    """The path of a GPU, on the CPU: there FlexAttention is compiled for the forward pass only."""
    tree = tree_of(TREES[name])
    tensors = [x.detach().float() for x in inputs(len(tree.ends))]
    mask = block_mask_of(tree.ends, CPU)
    with torch.no_grad():
        if compiled:
            layout = Layout(tree.depth, block_mask=mask)
            got, _ = tree_attention(torch.nn.Module(), *tensors, None, layout=layout, scaling=0.3)
        else:
            got = flex_attention(*tensors, block_mask=mask, scale=0.3, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(got, dense(*tensors, tree, 0.3))


@pytest.mark.parametrize(
    "option",
    [{"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"sliding_window": 6}, {"dropout": 0.1}, {"is_causal": False}],
)
def test_what_is_not_plain_causal_attention_is_refused(option):
    tree = tree_of([(7,)])
    layout, tensors = layout_of(tree, CPU), inputs(7)
    plain = {"softcap": None, "sliding_window": 7, "dropout": 0.0, "is_causal": True, "position_ids": torch.arange(7)}
    tree_attention(torch.nn.Module(), *tensors, None, layout=layout, **plain)
    with pytest.raises(NotImplementedError, match=f"its attention has {next(iter(option))}"):
        tree_attention(torch.nn.Module(), *tensors, None, layout=layout, **plain | option)
