"""Per-token numbers as one row per trajectory and one column per action: the next action is the next column."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Layout


class Trajectories:
    """The positions of each trajectory's actions among the tokens, padded or packed, masked or not.

    Environment tokens and padding have no column. So s_{h+1} is the state of the next ACTION, as docs/method.md
    section 1 defines it. Example: the mask [1, 0, 0, 1] of one trajectory gives positions [0, 3].

    Letters: B trajectories, L actions of the longest trajectory, M actions of all trajectories.
    """

    positions: Tensor
    """[B, L], the flat index of the h-th action of trajectory b where `valid` is true."""
    valid: Tensor
    """[B, L] bool"""
    last: Tensor
    """[B, L] bool, true at each trajectory's last action."""
    counts: Tensor
    """[B], the number of actions of each trajectory."""
    actions: Tensor
    """[M], the flat indices of all actions in order."""

    def __init__(self, shape: torch.Size, device: torch.device, layout: Layout):
        tokens = shape.numel()
        if layout.cu_seqlens is None:
            bounds = torch.arange(shape[0] + 1, device=device) * shape[1]
        else:
            bounds = layout.cu_seqlens.long()
        if layout.mask is None:
            actions = torch.arange(tokens, device=device)
        else:
            flat = layout.mask.reshape(-1)
            actions = flat.nonzero()[:, 0]
            bounds = torch.cat([flat.new_zeros(1, dtype=torch.long), flat.cumsum(0)])[bounds]
        starts, self.counts = bounds[:-1], bounds.diff()
        longest = int(self.counts.max()) if len(self.counts) else 0
        step = torch.arange(longest, device=device)
        self.shape, self.actions = shape, actions
        self.valid = step < self.counts[:, None]
        self.positions = actions[(starts[:, None] + step).clamp(max=max(len(actions) - 1, 0))]
        self.last = step == self.counts[:, None] - 1

    def rows(self, x: Tensor) -> Tensor:
        """[...] per token -> [B, L] per action, 0 past each trajectory's end."""
        return torch.where(self.valid, x.reshape(-1)[self.positions], 0)

    def tokens(self, x: Tensor) -> Tensor:
        """[B, L] per action -> [...] per token, 0 where there is no action."""
        out = x.new_zeros(self.shape)  # autograd lets nobody overwrite a result that is a view
        out.view(-1)[self.positions[self.valid]] = x[self.valid]
        return out


def next_state(v: Tensor) -> Tensor:
    """V(s_{h+1}) [B, L] from V(s_h) [B, L]; 0 after the last action (terminal)."""
    out = torch.zeros_like(v)
    out[:, :-1] = v[:, 1:]
    return out
