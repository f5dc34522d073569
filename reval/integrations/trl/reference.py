"""The weights of the reference policy, where they are not those of the policy at the start of a generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class ReferenceWeights:
    """The trained weights as they were at the last reset. With LoRA, those of the adapters alone.

    With a reset in every generation there is nothing to keep: all values of the reference are computed when the policy
    is the reference.
    """

    def __init__(self, model: nn.Module, reset_every: int):
        self.version = 0
        """Number of resets so far."""
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._reset_every = reset_every
        self._kept: dict[str, Tensor] = {}
        if reset_every != 1:
            self._kept = {name: p.detach().clone() for name, p in self._trained.items()}

    def before(self, iteration: int) -> None:
        """Reset, if a reset is due before this generation (from 1). All stored reference values become stale."""
        if iteration == 1 or not self._reset_every or (iteration - 1) % self._reset_every:
            return
        self.version += 1
        for name, kept in self._kept.items():
            kept.copy_(self._trained[name].detach())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within the block the model computes as the reference."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchange the model's weights with the kept ones, one tensor at a time: that is all the memory it takes."""
        for name, kept in self._kept.items():
            weight = self._trained[name]
            own = weight.clone()
            weight.copy_(kept)
            kept.copy_(own)

    def save(self, path: Path) -> None:
        """Write the kept weights to a safetensors file, if there are any."""
        if self._kept:
            save_file({name: kept.contiguous() for name, kept in self._kept.items()}, path)

    def load(self, path: Path, version: int) -> None:
        """The opposite of `save`. Raises ValueError if the run that saved kept no weights, but this one does."""
        if self._kept and not path.exists():
            raise ValueError(
                f"reference_reset_every must be 1, as in the run that saved {path.parent}, which has no {path.name}; "
                f"got {self._reset_every}"
            )
        self.version = version
        for name, tensor in (load_file(path) if self._kept else {}).items():
            self._kept[name].copy_(tensor)
