"""The replay buffer: whole trajectories, first in first out, drawn at random without replacement."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

NUMBERS = ("v", "log_prob", "returns")
"""The numbers in `Trajectory.reference` that the state of a buffer holds, see reference_policy.py."""


@dataclass(slots=True, eq=False)
class Trajectory:
    """A prompt, all tokens after it, and the reward. L is the number of tokens.

    The token ids are those that the policy sampled; text is never encoded again. ReVal needs no log-probabilities of
    the policy that generated the trajectory (behaviour log-probs): its loss has no importance ratio, so any policy may
    have generated it. GRPO and other objectives with a ratio use `behavior`.
    """

    token_ids: np.ndarray
    """int32 [L]: the prompt, then the model's tokens. With several turns also the environment's tokens in between."""
    action_mask: np.ndarray
    """bool [L]: true for the model's own tokens, the end-of-sequence token included."""
    reward: float
    """The outcome reward after shaping, as the loss uses it."""
    score: float
    """The raw reward from the reward function."""
    iteration: int
    """The iteration that generated the trajectory."""
    group: int = 0
    """The same number for all responses to one prompt of one iteration; no other group has it. 0: not known."""
    finished: bool = True
    """False if the length limit cut the response off. Training treats such a trajectory like any other."""
    uses: int = 0
    """Number of updates that have used the trajectory."""
    reference: dict[str, Any] = field(default_factory=dict)
    """The reference policy's values, see reference_policy.py. Empty until they are computed, stale after a reset."""
    behavior: np.ndarray | None = None
    """float32 [H], log mu(a_h|s_h) of the H actions. mu is the policy at the start of the iteration that used the
    trajectory first: the policy that generated it, unless rollout.ahead or another run made it older. Only known with
    reference.reset_every=1 (reference_policy.py)."""

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
        """The prompt without its last token; all responses to one prompt share it. May be empty."""
        return self.token_ids[: int(self.action_mask.argmax()) - 1]


class ReplayBuffer:
    """Holds the newest `capacity` trajectories. The caller passes in the random generator for draws."""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._held: deque[Trajectory] = deque(maxlen=capacity)
        self.added = 0
        """Number of trajectories added since the start."""

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Trajectory]:
        """The trajectories, oldest first."""
        return iter(self._held)

    def add(self, trajectories: list[Trajectory]) -> None:
        """Add trajectories. If the buffer is full, the oldest ones leave."""
        self._held.extend(trajectories)
        self.added += len(trajectories)

    def sample(self, count: int, rng: Random, draw: str = "uniform") -> list[Trajectory]:
        """At most `count` distinct trajectories. All trajectories if the buffer has no more than `count`.

        Args:
            draw: "uniform": `count` trajectories, every subset is equally likely. "groups": whole groups in random
                order, as many as fit in `count`, but at least one.
        """
        if draw == "uniform":
            return rng.sample(self._held, min(count, len(self._held)))
        groups = defaultdict(list)
        for t in self._held:
            groups[t.group].append(t)
        out: list[Trajectory] = []
        for group in rng.sample(list(groups.values()), len(groups)):
            if out and len(out) + len(group) > count:
                break
            out += group
        return out

    def metrics(self, iteration: int) -> dict[str, float]:
        """`buffer/size`, `buffer/age_mean` (iterations since generation) and `buffer/reuse_mean` (updates)."""
        held = max(len(self._held), 1)
        return {
            "buffer/size": len(self._held),
            "buffer/age_mean": sum(iteration - t.iteration for t in self._held) / held,
            "buffer/reuse_mean": sum(t.uses for t in self._held) / held,
        }

    def state(self) -> dict[str, np.ndarray]:
        """The buffer as a few flat arrays, oldest trajectory first. A safetensors file can hold such arrays."""
        held, found = list(self._held), [t.reference for t in self._held]
        values = [r["values"] for r in found if "values" in r]
        return {
            "added": np.array(self.added),
            "lengths": np.array([len(t) for t in held], np.int64),
            "token_ids": np.concatenate([np.empty(0, np.int32), *(t.token_ids for t in held)]),
            "action_mask": np.concatenate([np.empty(0, bool), *(t.action_mask for t in held)]),
            "numbers": np.array([[t.reward, t.score] for t in held], np.float64).reshape(-1, 2),
            "counts": np.array([[t.iteration, t.finished, t.uses] for t in held], np.int64).reshape(-1, 3),
            "groups": np.array([t.group for t in held], np.int64),
            "has_behavior": np.array([t.behavior is not None for t in held], bool),
            "behavior": np.concatenate(
                [np.empty(0, np.float32), *(t.behavior for t in held if t.behavior is not None)]
            ),
            "reference_version": np.array([r.get("version", -1) for r in found], np.int64),
            "reference": np.array([[r.get(key, 0) for key in NUMBERS] for r in found], np.float64).reshape(-1, 3),
            "has_values": np.array(["values" in r for r in found], bool),
            "values": np.concatenate([np.empty((0, 3), np.float32), *values]),
        }

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Replace the contents with the trajectories in `arrays`, which `state()` returned. If they exceed the
        capacity, the newest trajectories stay."""
        ends = arrays["lengths"].cumsum()
        values_from, behavior_from, held = 0, 0, []
        for i, (end, length) in enumerate(zip(ends, arrays["lengths"], strict=True)):
            span = slice(end - length, end)
            (reward, score), (iteration, finished, uses) = arrays["numbers"][i].tolist(), arrays["counts"][i].tolist()
            t = Trajectory(
                token_ids=arrays["token_ids"][span],
                action_mask=arrays["action_mask"][span],
                reward=reward,
                score=score,
                iteration=iteration,
                group=int(arrays["groups"][i]),
                finished=bool(finished),
                uses=uses,
            )
            count = int(t.action_mask.sum())
            if arrays["has_behavior"][i]:
                t.behavior = arrays["behavior"][behavior_from : behavior_from + count]
                behavior_from += count
            if (version := int(arrays["reference_version"][i])) >= 0:
                t.reference = {"version": version} | dict(zip(NUMBERS, arrays["reference"][i].tolist(), strict=True))
            if arrays["has_values"][i]:
                t.reference["values"] = arrays["values"][values_from : values_from + count]
                values_from += count
            held.append(t)
        self._held, self.added = deque(held, maxlen=self.capacity), int(arrays["added"])
        self.check()

    def check(self) -> None:
        """Raise AssertionError if the buffer is inconsistent."""
        assert len(self._held) <= self.capacity, "the buffer has more trajectories than its capacity"
        assert len(self._held) <= self.added, "the buffer has more trajectories than were ever added"
        assert len({id(t) for t in self._held}) == len(self._held), "the buffer has one trajectory twice"
        assert all(t.uses >= 0 for t in self._held), "a negative reuse count"
