"""Batches: trajectories as padded tensors, in micro-batches that keep a budget of tokens.

The responses to one prompt share its tokens. A batch contains each distinct prompt once, and the transformer computes
it once (`hidden_states` in model/forward.py). Each process gets its share of a batch, and all processes run the same
number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import Config, OptimConfig
from .distributed import World
from .replay import Trajectory


class Batch(NamedTuple):
    """B trajectories of P distinct prompts.

    A prefix is a prompt without its last token, and S is the length of the longest one. The [B, T] tensors start at the
    state s_1, the whole prompt: column 0 of `states` has the last token of the prompt. Between two turns of the model
    the columns have the tokens of the environment, and there `mask` is false.

    Example: prompt (5, 6, 7) and response (8, 9) give the prefix (5, 6), the states (7, 8) and the actions (8, 9).
    """

    prefixes: Tensor
    """int64 [P, S]: the prompts without their last token, padded on the left with 0."""
    prefix_mask: Tensor
    """int64 [P, S]: 1 for tokens, 0 for padding."""
    prefix_of: Tensor
    """int64 [B]: the row in `prefixes` of each trajectory."""
    states: Tensor
    """int64 [B, T]: the last token of each state, padded on the right with 0."""
    state_mask: Tensor
    """int64 [B, T]: 1 for tokens, 0 for padding."""
    actions: Tensor
    """int64 [B, T]: the token that follows each state."""
    mask: Tensor
    """bool [B, T]: true if the model chose the action, false for tokens of the environment and for padding. Always
    true in column 0."""
    rewards: Tensor
    """float32 [B]: shaped rewards."""
    share: bool
    """Compute each distinct prompt once."""
    packed: bool
    """Join the tokens of all trajectories into one sequence without padding, and compute this sequence."""


class MicroBatch(NamedTuple):
    """Trajectories that go through the transformer together."""

    indices: list[int]
    """Positions of these trajectories in the whole batch. The list is empty for a padding micro-batch: a process with
    fewer micro-batches than another runs padding ones, because FSDP needs every process to run the same number of
    forward and backward passes."""
    trajectories: list[Trajectory]
    """A padding micro-batch has one trajectory, the first of the whole batch."""
    batch: Batch


def plan(trajectories: list[Trajectory], world: World, device: torch.device, config: Config) -> list[MicroBatch]:
    """Split a batch, which every process holds, and return the micro-batches of this process.

    Every process gets the same number of micro-batches. Otherwise the process with the most micro-batches would
    wait for the others forever.
    """
    # Two cases exclude shared prompts. FSDP frees a layer's weights after the layer's backward pass, and the gradient
    # through the keys of a shared prompt would need them again. And transformers keeps no cache of keys and values
    # while it checkpoints activations.
    share = world.size == 1 and not config.model.gradient_checkpointing
    own = _shares(trajectories, world.size)[world.rank]
    members = [[own[i] for i in group] for group in micro_batches([trajectories[i] for i in own], config.optim, share)]
    members += [[]] * (max(world.gather(len(members))) - len(members))
    out = []
    for indices in members:
        chosen = [trajectories[i] for i in indices or [0]]
        batch = collate(chosen, device, share=share, packed=config.optim.packing)
        out.append(MicroBatch(indices, chosen, batch))
    return out


def _shares(trajectories: list[Trajectory], count: int) -> list[list[int]]:
    """The indices in `count` shares with about equal numbers of tokens: the longest trajectory first, each to the share
    with the fewest tokens."""
    out: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for i in sorted(range(len(trajectories)), key=lambda i: -len(trajectories[i])):
        lightest = load.index(min(load))
        out[lightest].append(i)
        load[lightest] += len(trajectories[i])
    return [sorted(share) for share in out]


def collate(trajectories: list[Trajectory], device: torch.device, *, share: bool = True, packed: bool = False) -> Batch:
    """One padded batch. `share` has no effect where sharing saves nothing: without a prefix, or if no two trajectories
    have the same prompt, or if the batch is packed."""
    numbers: dict[bytes, int] = {}
    prefix_of = [numbers.setdefault(t.prefix.tobytes(), len(numbers)) for t in trajectories]
    prompts = [np.frombuffer(key, np.int32) for key in numbers]
    prefixes, prefix_mask = _pad(prompts, left=True)
    starts = [len(t.prefix) for t in trajectories]
    states, state_mask = _pad([t.token_ids[n:-1] for t, n in zip(trajectories, starts, strict=True)])
    actions, _ = _pad([t.token_ids[n + 1 :] for t, n in zip(trajectories, starts, strict=True)])
    mask, _ = _pad([t.action_mask[n + 1 :] for t, n in zip(trajectories, starts, strict=True)])
    rewards = np.array([t.reward for t in trajectories], np.float32)
    arrays = (prefixes, prefix_mask, np.array(prefix_of), states, state_mask, actions, mask.astype(bool), rewards)
    share = share and not packed and prefixes.shape[1] > 0 and len(prompts) < len(trajectories)
    return Batch._make([*(torch.from_numpy(x).to(device) for x in arrays), share, packed])


def micro_batches(trajectories: list[Trajectory], config: OptimConfig, share: bool = True) -> Iterator[list[int]]:
    """Indices of the trajectories of each micro-batch.

    A micro-batch has at most optim.micro_batch_tokens tokens, padding included. A single longer trajectory is a
    micro-batch by itself. The trajectories are sorted first: responses to one prompt become neighbours, and so do
    prompts of similar length. This keeps the padding small.

    Args:
        share: count the tokens of a shared prompt once.
    """
    order = sorted(
        range(len(trajectories)),
        key=lambda i: (-len(trajectories[i].prefix), trajectories[i].prefix.tobytes(), -len(trajectories[i])),
    )
    held: list[int] = []
    for i in order:
        if held and _tokens([trajectories[j] for j in (*held, i)], config.packing, share) > config.micro_batch_tokens:
            yield held
            held = []
        held.append(i)
    if held:
        yield held


def _tokens(trajectories: list[Trajectory], packed: bool, share: bool) -> int:
    """Number of tokens that the transformer computes for a batch of these trajectories, padding included."""
    if packed:
        return sum(map(len, trajectories))
    prompts = len({t.prefix.tobytes() for t in trajectories}) if share else len(trajectories)
    longest = max(len(t.prefix) for t in trajectories)
    return prompts * longest + len(trajectories) * max(len(t) - len(t.prefix) for t in trajectories)


def _pad(rows: list[np.ndarray], left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The rows as one int64 array, padded with 0, and an int64 mask with 1 for their entries."""
    width = max(len(row) for row in rows)
    padded, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        padded[i, place], mask[i, place] = row, 1
    return padded, mask
