"""Which trajectories a replay buffer holds, for trainers that keep the trajectories in a store of their own."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any


@dataclass
class Entry:
    """A trajectory in the trainer's store."""

    key: str
    """Its name in the store."""
    version: int
    """The version of the weights that generated it; the oldest one, if the weights changed in between."""
    tag: Any = None
    """What the trainer wants to have beside the key."""


class ReplayIndex:
    """First in, first out, with a limit on the number of trajectories and on their age in versions of the weights."""

    def __init__(self, capacity: int, max_staleness_versions: int | None = None, seed: int = 0):
        """
        Args:
            capacity: the most trajectories that stay.
            max_staleness_versions: the most versions of the weights by which a trajectory may lag behind the current
                one. 0: only the current version; None: no limit.
            seed: of the draws.

        Raises:
            ValueError: a number out of its range.
        """
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1 trajectory, got {capacity}")
        if max_staleness_versions is not None and max_staleness_versions < 0:
            raise ValueError(f"max_staleness_versions must be at least 0, or None; got {max_staleness_versions}")
        self.capacity = capacity
        self.max_staleness_versions = max_staleness_versions
        self.seed = seed
        self._held: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._held)

    def admit(self, entries: list[Entry]) -> None:
        """Add trajectories. They may exceed the capacity until `evict` is called."""
        for entry in entries:
            if entry.key in self._held:
                raise ValueError(f"the replay buffer already has a trajectory {entry.key!r}")
            self._held[entry.key] = entry

    def evict(self, version: int) -> list[str]:
        """Remove what is too old for the current `version` of the weights, then the oldest beyond the capacity.

        Returns:
            The keys of the removed trajectories. The caller deletes them from its store.
        """
        limit = self.max_staleness_versions
        stale = [e.key for e in self._held.values() if limit is not None and version - e.version > limit]
        kept = sorted((e for e in self._held.values() if e.key not in set(stale)), key=lambda e: e.version)
        out = stale + [e.key for e in kept[: max(0, len(kept) - self.capacity)]]
        for key in out:
            del self._held[key]
        return out

    def select(self, count: int, draw: str) -> list[Entry]:
        """`count` distinct trajectories, every subset equally likely; all of them if there are no more.

        The same contents, seed and `draw` (the name of the draw, as "step 7, update 2") give the same trajectories, so
        a resumed run needs no state of a random generator.
        """
        held = sorted(self._held.values(), key=lambda e: (e.version, e.key))
        return Random(f"{self.seed}: {draw}").sample(held, min(count, len(held)))

    def staleness(self, version: int) -> float:
        """The mean number of versions by which the trajectories lag behind `version`; 0 for an empty buffer."""
        return sum(version - e.version for e in self._held.values()) / max(len(self._held), 1)
