"""Trajectories as padded tensors, in micro-batches that fit a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .replay import Trajectory


class Batch(NamedTuple):
    """B trajectories of at most T + 1 tokens. State t is the one before token t + 1, so tensors of actions have T."""

    token_ids: Tensor
    """int64 [B, T + 1], padded on the right with 0."""
    attention_mask: Tensor
    """int64 [B, T + 1], 1 for tokens."""
    actions: Tensor
    """int64 [B, T]: the token that follows each state."""
    mask: Tensor
    """bool [B, T]: whether that token is the model's own."""
    rewards: Tensor
    """float32 [B]"""

    def first_states(self) -> tuple[Tensor, Tensor]:
        """Indices of s_1, the state of the first action: rows [B] and columns [B]."""
        return torch.arange(len(self.mask), device=self.mask.device), self.mask.int().argmax(dim=1)


def collate(trajectories: list[Trajectory], device: torch.device) -> Batch:
    """One padded batch."""
    shape = (len(trajectories), max(len(t) for t in trajectories))
    ids, attention, own = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, t in enumerate(trajectories):
        ids[row, : len(t)], attention[row, : len(t)], own[row, : len(t)] = t.token_ids, 1, t.action_mask
    token_ids = torch.from_numpy(ids).to(device)
    rewards = torch.tensor([t.reward for t in trajectories], dtype=torch.float32, device=device)
    return Batch(
        token_ids, torch.from_numpy(attention).to(device), token_ids[:, 1:], torch.from_numpy(own[:, 1:]).to(device),
        rewards,
    )  # fmt: skip


def micro_batches(trajectories: list[Trajectory], max_tokens: int) -> Iterator[list[int]]:
    """Indices of the trajectories that go together: alike in length, at most `max_tokens` with padding (one alone may
    have more)."""
    order = sorted(range(len(trajectories)), key=lambda i: -len(trajectories[i]))
    start = 0
    while start < len(order):
        size = max(1, max_tokens // len(trajectories[order[start]]))
        yield order[start : start + size]
        start += size
