"""The studies: which methods are compared, on which task, and which settings each of them may tune.

To add a method or a study, add a few lines here. Every method of a study has the same number of trials and rungs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .tasks import TASKS, Task


@dataclass(frozen=True)
class Trial:
    """One point of a method's grid, as overrides."""

    method: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: settings that it always has, and the grid of those that are tuned."""

    name: str
    overrides: tuple[str, ...]
    grid: Mapping[str, Sequence[object]]
    """Values by the name of a setting. The grid has all their combinations."""

    def trials(self, count: int) -> list[Trial]:
        """`count` random points of the grid, the same in every call, in the order of the grid.

        Raises ValueError if the grid has fewer points.
        """
        names = list(self.grid)
        points = [
            tuple(f"{name}={value}" for name, value in zip(names, values, strict=True))
            for values in itertools.product(*self.grid.values())
        ]
        if len(points) < count:
            raise ValueError(
                f"the grid of {self.name!r} has {len(points)} points, fewer than the study's {count} trials"
            )
        chosen = sorted(random.Random(0).sample(range(len(points)), count))
        return [Trial(self.name, points[i]) for i in chosen]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of methods on one task."""

    name: str
    task: Task
    methods: tuple[Method, ...]
    trials: int
    """Number of trials of each method in the first rung."""
    rungs: tuple[int, ...] = (1, 2)
    """For each rung, how many seeds a trial has had after it. The better half of the trials goes on; after the last
    rung, the best one."""
    seeds: int = 3
    """Number of seeds of each method's best trial. They are other seeds than those of the rungs: the best of many
    trials was lucky too, and its own seeds would flatter it."""
    levels: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    """Accuracies; the report says what each method needed to reach them."""
    overrides: tuple[str, ...] = ()
    """Settings of every method."""

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


def methods(*rates: float) -> tuple[Method, ...]:
    """ReVal and GRPO. `rates`: the learning rates that ReVal may use; GRPO, which has no beta and K, gets more."""
    between = {float(f"{rate * factor:.2g}") for rate in rates for factor in (0.5, 0.7, 1.0, 1.5, 2.0)}
    return (
        Method(
            name="ReVal",
            overrides=("reward.shaping=normalized", "reference.reset_every=1"),
            grid={
                "objective.beta": (0.25, 0.5, 1.0),
                "optim.lr": rates,
                "replay.updates_per_iteration": (1, 2, 4),
            },
        ),
        Method(
            name="GRPO",
            overrides=("objective.name=grpo", "reward.shaping=normalized", "replay.updates_per_iteration=1"),
            grid={"optim.lr": sorted(between)},
        ),
    )


FAST = methods(3e-4, 5e-4, 1e-3)

STUDIES = {
    study.name: study
    for study in (
        Study(name="methods", task=TASKS["sums"], methods=FAST, trials=12, rungs=(1, 2, 3)),
        *(
            Study(name=name, task=TASKS[name], methods=FAST, trials=8)
            for name in ("rare", "long", "one-easy", "one-medium", "one-hard")
        ),
        Study(name="demo", task=TASKS["demo"], methods=methods(2e-5, 3e-5, 5e-5), trials=4),
    )
}
