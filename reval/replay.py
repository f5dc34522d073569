"""The replay buffer: whole trajectories, first in, first out, drawn uniformly without replacement."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np


@dataclass(slots=True, eq=False)
class Trajectory:
    """A prompt and what followed it, as token ids that are never encoded again, with its reward.

    Behaviour log-probs are not kept: the loss has no importance ratio, so any policy may have generated it.
    """

    token_ids: np.ndarray
    """int32 [L]: prompt, the model's tokens, and the environment's where there are several turns."""
    action_mask: np.ndarray
    """bool [L]: true for the model's own tokens (its end-of-sequence token too)."""
    reward: float
    """What the loss uses: the outcome reward after shaping."""
    score: float
    """What the reward function said."""
    iteration: int
    """The iteration that generated it."""
    finished: bool = True
    """False when the length limit cut it off; it is a whole trajectory all the same."""
    uses: int = 0
    """Updates that have used it."""
    reference: dict[str, Any] = field(default_factory=dict)
    """What the reference policy says about it: see reference_policy.py. Empty until asked, stale after a reset."""

    def __post_init__(self) -> None:
        self.token_ids = np.asarray(self.token_ids, dtype=np.int32)
        self.action_mask = np.asarray(self.action_mask, dtype=bool)
        if self.token_ids.ndim != 1 or self.token_ids.shape != self.action_mask.shape:
            raise ValueError(
                f"token_ids and action_mask must be vectors of one length, got {self.token_ids.shape} and "
                f"{self.action_mask.shape}"
            )
        if not self.action_mask.any():
            raise ValueError("action_mask marks no token: a trajectory needs an action")
        if self.action_mask[0]:
            raise ValueError("action_mask marks the first token, which no state comes before")
        if not np.isfinite(self.reward):
            raise ValueError(f"reward must be finite, got {self.reward}")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def prefix(self) -> np.ndarray:
        """The tokens before s_1's last one: what all responses to one prompt share. May be empty."""
        return self.token_ids[: int(self.action_mask.argmax()) - 1]


class ReplayBuffer:
    """The newest `capacity` trajectories. Randomness is passed in; `check` verifies the buffer itself."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._held: deque[Trajectory] = deque(maxlen=capacity)
        self.added = 0
        """Trajectories ever added."""

    def __len__(self) -> int:
        return len(self._held)

    def add(self, trajectories: list[Trajectory]) -> None:
        """Take in trajectories, the oldest leaving where room is short."""
        self._held.extend(trajectories)
        self.added += len(trajectories)

    def sample(self, count: int, rng: Random) -> list[Trajectory]:
        """`count` distinct trajectories, each subset equally likely; all of them when fewer are held."""
        return rng.sample(self._held, min(count, len(self._held)))

    def metrics(self, iteration: int) -> dict[str, float]:
        """`buffer/size`, and the mean age (iterations) and reuse (updates) of what is held."""
        held = max(len(self._held), 1)
        return {
            "buffer/size": len(self._held),
            "buffer/age_mean": sum(iteration - t.iteration for t in self._held) / held,
            "buffer/reuse_mean": sum(t.uses for t in self._held) / held,
        }

    def state(self) -> dict[str, Any]:
        """All that `load_state` needs, oldest trajectory first."""
        return {"capacity": self.capacity, "added": self.added, "trajectories": list(self._held)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Become the buffer whose state this is; a smaller capacity keeps the newest."""
        self._held = deque(state["trajectories"], maxlen=self.capacity)
        self.added = state["added"]
        self.check()

    def check(self) -> None:
        """Raise AssertionError if the buffer contradicts itself."""
        assert len(self._held) <= self.capacity, "more held than fits"
        assert len(self._held) <= self.added, "more held than was ever added"
        assert len({id(t) for t in self._held}) == len(self._held), "a trajectory is held twice"
        assert all(t.uses >= 0 for t in self._held), "a negative reuse count"
