"""Batches: the tokens of trajectories for one forward pass, in micro-batches that keep a budget of tokens.

The hidden state of a token depends only on the tokens before it. So what several trajectories have in common from
their first token on (a system message, the prompt of a group, equal beginnings of responses) is computed once: the
tokens of a micro-batch are a prefix tree, written as one sequence without padding. Models that cannot compute such a
tree get other forms, see `Form`.

Each process gets its share of a batch, and all processes run the same number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .distributed import World
from .replay import Trajectory


class Form(Enum):
    """How the tokens of a micro-batch are laid out for the transformer."""

    TREE = "tree"
    """One row, the prefix tree: nothing is computed twice, nothing is padded. Needs `tree_attention`."""
    JOINED = "joined"
    """One row, one trajectory after the other, for attentions that know such rows, such as flash attention."""
    PADDED = "padded"
    """One row per trajectory, padded on the right: for every model."""


class PrefixTree(NamedTuple):
    """N tokens in preorder: a token comes after its predecessors, and before every later branch.

    Example: the sequences (5, 6, 7) and (5, 8) are the tokens 5 6 7 8, with `ends` 4 3 3 4 and `runs` 0 1 3.
    """

    ends: np.ndarray
    """int64 [N]: one more than the last token of the subtree of each token. Token q follows token k, at some distance,
    exactly if k < q < ends[k]."""
    runs: np.ndarray
    """int64: the first token of each run, ascending. Within a run the tree has no branch."""
    depth: int
    """The number of tokens of the longest sequence."""


class Batch(NamedTuple):
    """B trajectories with M actions in all, at most H in one.

    The state of an action is the token before it: its hidden state gives the logits of the action. Tokens of an
    environment between two turns of the model are computed, but they are no actions.
    """

    tokens: Tensor
    """int64 [R, L]: R rows of tokens. The last action of a trajectory is left out, because nothing follows it."""
    positions: Tensor
    """int64 [R, L]: the place of each token in its trajectory, from 0."""
    states: Tensor
    """int64 [M]: the place of each action's state in `tokens`, counted row by row."""
    actions: Tensor
    """int64 [M]: the actions of trajectory 0, then those of trajectory 1, ..."""
    cu_seqlens: Tensor
    """int64 [B + 1]: trajectory b has the actions cu_seqlens[b] to cu_seqlens[b + 1] - 1."""
    mask: Tensor
    """bool [B, H]: true for the columns that trajectory b has actions for."""
    places: Tensor
    """int64 [M]: the place of each action in `mask`, counted row by row."""
    rewards: Tensor
    """float32 [B]: shaped rewards."""
    behavior: Tensor
    """float32 [B, H]: log mu(a_h|s_h), see Trajectory.behavior. NaN where it is not known, and where no action is."""
    token_mask: Tensor | None
    """int64 [R, L]: 1 for tokens, 0 for padding. None: no padding."""
    tree: PrefixTree | None
    """The tree that the single row is, for Form.TREE."""

    def pad(self, x: Tensor) -> Tensor:
        """[M, ...] per action -> [B, H, ...], 0 where a trajectory has no action. Differentiable."""
        out = x.new_zeros(self.mask.numel(), *x.shape[1:]).index_copy(0, self.places, x)
        return out.view(*self.mask.shape, *x.shape[1:])


class MicroBatch(NamedTuple):
    """Trajectories that go through the transformer together."""

    indices: list[int]
    """Positions of these trajectories in the whole batch. The list is empty for a padding micro-batch: a process with
    fewer micro-batches than another runs padding ones, because FSDP needs every process to run the same number of
    forward and backward passes."""
    trajectories: list[Trajectory]
    """A padding micro-batch has one trajectory, the shortest of the whole batch."""
    batch: Batch


def plan(
    trajectories: list[Trajectory], world: World, device: torch.device, form: Form, budget: int
) -> list[MicroBatch]:
    """Split a batch, which every process holds, and return the micro-batches of this process.

    Every process gets the same number of micro-batches. Otherwise the process with the most micro-batches would
    wait for the others forever.

    Args:
        budget: the setting optim.micro_batch_tokens.
    """
    own = _shares(trajectories, world.size, form)[world.rank]
    members = [[own[i] for i in group] for group in micro_batches([trajectories[i] for i in own], form, budget)]
    members += [[]] * (max(world.gather(len(members))) - len(members))
    shortest = min(range(len(trajectories)), key=lambda i: len(trajectories[i]))
    chosen = [[trajectories[i] for i in indices or [shortest]] for indices in members]
    batches = [collate(some, device, form) for some in chosen]
    return [MicroBatch(*parts) for parts in zip(members, chosen, batches, strict=True)]


def micro_batches(trajectories: list[Trajectory], form: Form, budget: int) -> Iterator[list[int]]:
    """Indices of the trajectories of each micro-batch.

    A micro-batch computes at most `budget` tokens, padding included. A single longer trajectory is a micro-batch by
    itself.
    """
    cuts = _cut_padded if form is Form.PADDED else _cut
    return cuts(_ordered(trajectories, form), budget)


class _Item(NamedTuple):
    """A trajectory in the order in which a batch is cut."""

    number: int
    length: int
    """The tokens that the transformer computes for this trajectory alone."""
    shared: int
    """How many of them it shares with the trajectory before it."""


def _ordered(trajectories: list[Trajectory], form: Form) -> list[_Item]:
    """The trajectories in the order in which they are cut: the longest first if they are padded; for a tree those with
    an equal beginning are neighbours."""
    sequences = [t.token_ids[:-1] for t in trajectories]
    if form is not Form.TREE:
        return sorted((_Item(i, len(x), 0) for i, x in enumerate(sequences)), key=lambda item: -item.length)
    order = _alphabetical(sequences)
    before = [np.empty(0, np.int32), *(sequences[i] for i in order)]
    return [_Item(i, len(sequences[i]), _common(b, sequences[i])) for b, i in zip(before, order, strict=False)]


def _shares(trajectories: list[Trajectory], count: int, form: Form) -> list[list[int]]:
    """The indices in `count` shares with about equal numbers of tokens.

    The batch is cut into many pieces of neighbours, which share beginnings. The largest piece comes first, each goes to
    the share with the fewest tokens.
    """
    items = _ordered(trajectories, form)
    if count == 1:
        return [[item.number for item in items]]
    size = sum(item.length - item.shared for item in items) // (8 * count)
    by_number = {item.number: item for item in items}
    pieces = []
    for piece in _cut(items, size):
        first, *rest = (by_number[i] for i in piece)
        pieces.append((first.length + sum(item.length - item.shared for item in rest), piece))
    out: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for tokens, piece in sorted(pieces, key=lambda pair: -pair[0]):
        lightest = load.index(min(load))
        out[lightest] += piece
        load[lightest] += tokens
    return out


def _cut(items: list[_Item], budget: int) -> Iterator[list[int]]:
    """Indices of neighbours with at most `budget` tokens together, or of one longer trajectory."""
    held: list[int] = []
    tokens = 0
    for number, length, shared in items:
        if held and tokens + length - shared > budget:
            yield held
            held, tokens = [], 0
        tokens += length - shared if held else length
        held.append(number)
    if held:
        yield held


def _cut_padded(items: list[_Item], budget: int) -> Iterator[list[int]]:
    """Indices of trajectories of similar lengths. The sum of all tokens, padding included, is the least possible if one
    more micro-batch counts as much as one 200th of the batch's tokens."""
    lengths = np.array([item.length for item in items])
    overhead = lengths.sum() / 200
    least = np.zeros(len(items) + 1)  # of the first n trajectories
    start = np.zeros(len(items) + 1, int)  # of the last micro-batch of the first n trajectories
    for n in range(1, len(items) + 1):
        tokens = np.arange(n, 0, -1) * lengths[:n]
        cost = least[:n] + tokens + overhead
        cost[:-1][tokens[:-1] > budget] = np.inf
        start[n] = cost.argmin()
        least[n] = cost[start[n]]
    bounds = [len(items)]
    while bounds[-1]:
        bounds.append(int(start[bounds[-1]]))
    for a, b in zip(bounds[:0:-1], bounds[-2::-1], strict=True):
        yield [item.number for item in items[a:b]]


def collate(trajectories: list[Trajectory], device: torch.device, form: Form = Form.TREE) -> Batch:
    """One batch of these trajectories, in this order."""
    sequences = [t.token_ids[:-1] for t in trajectories]
    tree, token_mask = None, None
    if form is Form.TREE:
        tokens, positions, places, tree = _prefix_tree(sequences)
    elif form is Form.JOINED:
        starts = np.cumsum([0, *map(len, sequences)])
        places = [np.arange(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
        tokens, positions = np.concatenate(sequences), np.concatenate([np.arange(len(x)) for x in sequences])
    else:
        width = max(map(len, sequences))
        places = [np.arange(len(x)) + row * width for row, x in enumerate(sequences)]
        tokens, token_mask = np.zeros((2, len(sequences), width), np.int64)
        for row, x in enumerate(sequences):
            tokens[row, : len(x)], token_mask[row, : len(x)] = x, 1
        positions = np.broadcast_to(np.arange(width), tokens.shape)
    chosen = [t.action_mask[1:] for t in trajectories]
    counts = np.array([row.sum() for row in chosen])
    mask = np.arange(counts.max()) < counts[:, None]
    states = np.concatenate([x[row] for x, row in zip(places, chosen, strict=True)])
    actions = np.concatenate([t.token_ids[t.action_mask] for t in trajectories])
    behavior = np.full(mask.shape, np.nan, np.float32)
    for row, t in zip(behavior, trajectories, strict=True):
        if t.behavior is not None:
            row[: len(t.behavior)] = t.behavior
    integers = (np.atleast_2d(tokens), np.atleast_2d(positions), states, actions, np.cumsum([0, *counts]))
    rest = (mask, np.flatnonzero(mask), np.array([t.reward for t in trajectories], np.float32), behavior)
    padding = [] if token_mask is None else [token_mask]
    arrays = (*(x.astype(np.int64) for x in integers), *rest, *padding)
    return Batch._make([*(on_device(torch.from_numpy(x), device) for x in arrays), *[None] * (not padding), tree])


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device. From pinned memory a GPU copies it without a wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _prefix_tree(sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], PrefixTree]:
    """The tokens [N] of the tree, their positions [N], each sequence's places among them, and the tree."""
    places = [np.empty(0, np.int64)] * len(sequences)
    ends = np.empty(sum(map(len, sequences)), np.int64)
    tokens, positions = [], []
    runs: set[int] = set()
    count, before, path = 0, np.empty(0, np.int32), np.empty(0, np.int64)
    for i in _alphabetical(sequences):
        sequence = sequences[i]
        shared = _common(before, sequence)
        runs.update((count, *path[shared : shared + 1].tolist()))  # a branch, and what stood at this place before
        ends[path[shared:]] = count
        tokens.append(sequence[shared:])
        positions.append(np.arange(shared, len(sequence)))
        path = np.concatenate([path[:shared], np.arange(count, count + len(sequence) - shared)])
        count, before, places[i] = count + len(sequence) - shared, sequence, path
    ends[path] = count
    runs.discard(count)
    tree = PrefixTree(ends[:count], np.array(sorted(runs)), max(map(len, sequences)))
    return np.concatenate(tokens), np.concatenate(positions), places, tree


def _alphabetical(sequences: list[np.ndarray]) -> list[int]:
    """Indices in the order of a dictionary, in which sequences with an equal beginning are neighbours."""
    words = [x.astype(">u4").tobytes() for x in sequences]
    return sorted(range(len(words)), key=words.__getitem__)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The number of tokens that both sequences begin with."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    return int(different.argmax()) if different.any() else size
