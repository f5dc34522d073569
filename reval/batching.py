"""Trajectories as padded tensors, in micro-batches that fit a budget of tokens.

The responses to one prompt share its tokens: a batch holds each distinct prompt once, and the transformer computes it
once (`hidden_states` in model/forward.py). Each process gets its part of the batch; all of them take the same number of
steps.
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
    """B trajectories of P distinct prompts. Column h of the [B, T] tensors is the h-th state from s_1 on."""

    prefixes: Tensor
    """int64 [P, S]: the prompts without their last token, padded on the left with 0."""
    prefix_mask: Tensor
    """int64 [P, S], 1 for tokens."""
    prefix_of: Tensor
    """int64 [B]: which prompt each trajectory follows."""
    states: Tensor
    """int64 [B, T]: the last token of each state (the prompt's last one first), padded on the right with 0."""
    state_mask: Tensor
    """int64 [B, T], 1 for tokens."""
    actions: Tensor
    """int64 [B, T]: the token that follows each state."""
    mask: Tensor
    """bool [B, T]: whether that token is the model's own. Always true in column 0."""
    rewards: Tensor
    """float32 [B]"""
    share: bool
    """Compute each distinct prompt once."""
    packed: bool
    """Join the true tokens to one sequence instead."""


class MicroBatch(NamedTuple):
    """Trajectories that go through the transformer together."""

    indices: list[int]
    """Which ones of the whole batch. None in a stand-in, which only keeps this process in step with the others."""
    trajectories: list[Trajectory]
    batch: Batch


def plan(trajectories: list[Trajectory], world: World, device: torch.device, config: Config) -> list[MicroBatch]:
    """This process's micro-batches of a batch that all processes hold: as many on each, or they would wait forever."""
    # FSDP frees a layer's weights after its backward, and a shared prompt's keys would need them again; and
    # transformers keeps no cache while it checkpoints activations
    share = world.size == 1 and not config.model.gradient_checkpointing
    own = _partition(trajectories, world.size)[world.rank]
    parts = [[own[i] for i in part] for part in micro_batches([trajectories[i] for i in own], config.optim, share)]
    parts += [[]] * (max(world.gather(len(parts))) - len(parts))
    members = [[trajectories[i] for i in part or [0]] for part in parts]
    return [
        MicroBatch(part, these, collate(these, device, share=share, packed=config.optim.packing))
        for part, these in zip(parts, members, strict=True)
    ]


def _partition(trajectories: list[Trajectory], parts: int) -> list[list[int]]:
    """Indices, in so many parts of about as many tokens."""
    out: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for i in sorted(range(len(trajectories)), key=lambda i: -len(trajectories[i])):
        lightest = load.index(min(load))
        out[lightest].append(i)
        load[lightest] += len(trajectories[i])
    return [sorted(part) for part in out]


def collate(trajectories: list[Trajectory], device: torch.device, *, share: bool = True, packed: bool = False) -> Batch:
    """One padded batch. `share` is taken back where it would save nothing."""
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
    """Indices of the trajectories that go together: responses to one prompt first of all, prompts alike in length, at
    most `optim.micro_batch_tokens` with padding (one trajectory alone may have more). `share`: prompts count once."""
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
    """Tokens that a batch of these computes, padding included."""
    if packed:
        return sum(map(len, trajectories))
    prompts = len({t.prefix.tobytes() for t in trajectories}) if share else len(trajectories)
    longest = max(len(t.prefix) for t in trajectories)
    return prompts * longest + len(trajectories) * max(len(t) - len(t.prefix) for t in trajectories)


def _pad(rows: list[np.ndarray], left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The rows as one int64 array, and which of its entries are theirs."""
    width = max(len(row) for row in rows)
    padded, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        padded[i, place], mask[i, place] = row, 1
    return padded, mask
