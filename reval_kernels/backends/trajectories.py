"""Per-token numbers as one row a trajectory, so that the next action is always the next column."""

from __future__ import annotations

import torch
from torch import Tensor


class Trajectories:
    """Where the actions of each trajectory lie among the tokens, padded or packed, masked or not.

    `positions` [B, L] holds the flat index of the h-th action of trajectory b where `valid` [B, L] is true; L is the
    largest number of actions. Environment tokens and padding have no column, so s_{h+1} is the state of the next
    ACTION, as METHOD.md section 1 wants it. `counts` [B] are the numbers of actions.
    """

    def __init__(self, shape: torch.Size, device: torch.device, mask: Tensor | None, cu_seqlens: Tensor | None):
        tokens = shape.numel()
        if cu_seqlens is None:
            bounds = torch.arange(shape[0] + 1, device=device) * shape[1]
        else:
            bounds = cu_seqlens.long()
            if bounds[0] != 0 or bounds[-1] != tokens or (bounds.diff() < 0).any():
                raise ValueError(
                    f"cu_seqlens must start at 0, never fall and end at N = {tokens}, got {cu_seqlens.tolist()}"
                )
        if mask is None:
            actions = torch.arange(tokens, device=device)
        else:
            flat = mask.reshape(-1)
            actions = flat.nonzero()[:, 0]
            bounds = torch.cat([flat.new_zeros(1, dtype=torch.long), flat.cumsum(0)])[bounds]
        self.shape = shape
        self.starts, self.counts = bounds[:-1], bounds.diff()
        longest = int(self.counts.max()) if len(self.counts) else 0
        step = torch.arange(longest, device=device)
        self.valid = step < self.counts[:, None]
        self.positions = actions[(self.starts[:, None] + step).clamp(max=max(len(actions) - 1, 0))]
        self.last = step == self.counts[:, None] - 1
        self.actions = actions

    def rows(self, x: Tensor) -> Tensor:
        """[...] per token -> [B, L] per action, 0 past each trajectory's end."""
        return torch.where(self.valid, x.reshape(-1)[self.positions], 0)

    def tokens(self, x: Tensor) -> Tensor:
        """[B, L] per action -> [...] per token, 0 where there is no action."""
        out = x.new_zeros(self.shape.numel())
        out[self.positions[self.valid]] = x[self.valid]
        return out.view(self.shape)


def next_state(v: Tensor) -> Tensor:
    """V(s_{h+1}) [B, L] from V(s_h) [B, L]; 0 after the last action (terminal)."""
    out = torch.zeros_like(v)
    out[:, :-1] = v[:, 1:]
    return out
