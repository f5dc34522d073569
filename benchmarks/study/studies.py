"""The studies: which methods are compared, on which task, and which settings each of them may tune.

To add a method or a study, add a few lines here. Every method of a study has the same number of trials and rungs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


FOLLOWING = ("reward.shaping=normalized", "reference.reset_every=1")
"""Near targets: each iteration asks for a change in proportion to the advantage, from where the policy is."""
RECIPE = ("objective.taper=true", "objective.value_gradient=false")
RATES = (3e-4, 6e-4, 1e-3, 1.5e-3)


def reval(name: str = "ReVal", *overrides: str, **grid: Any) -> Method:
    """ReVal with normalized rewards, a reference that follows the policy, tapered wrong responses and no gradient
    through V. `grid` replaces the values of beta, lr or k."""
    return Method(
        name=name,
        overrides=(*FOLLOWING, *RECIPE, *overrides),
        grid=_grid(**{"beta": (0.1, 0.25, 0.5)} | grid),
    )


def paper(*overrides: str, **grid: Any) -> Method:
    """ReVal as in its paper: 0/1 rewards, a fixed reference, and V as the baseline."""
    return Method(
        name="ReVal, 0/1 rewards",
        overrides=(*overrides, "reward.shaping=plain"),
        grid=_grid(**{"beta": (0.05, 0.1)} | grid),
    )


def policy_gradient(name: str, objective: str, *overrides: str, **grid: Any) -> Method:
    """An objective of reval/policy_gradients.py. Its reused responses come from the same buffer as ReVal's."""
    return Method(name=name, overrides=(*FOLLOWING, f"objective.name={objective}", *overrides), grid=_grid(**grid))


def _grid(**values: Any) -> dict[str, Sequence[object]]:
    names = {"beta": "objective.beta", "lr": "optim.lr", "k": "replay.updates_per_iteration"}
    return {names[name]: own for name, own in ({"lr": RATES[1:3], "k": (4, 8)} | values).items()}


def grpo(*overrides: str, **grid: Any) -> tuple[Method, Method]:
    """GRPO on fresh responses alone, and GRPO that reuses them with ratio and clip."""
    return (
        policy_gradient("GRPO, K = 1", "grpo", *overrides, **({"lr": RATES} | grid | {"k": (1,)})),
        policy_gradient("GRPO with replay", "grpo", *overrides, **grid),
    )


STEEP = (1e-3, 2e-3)
"""Learning rates of the task `long`, on which every method was best with the largest one of an earlier grid."""
SHORT = ("run.iterations=32", "optim.schedule=linear")
SINGLE = ("rollout.prompts=64", "rollout.responses=1", "reward.shaping=batch_normalized")
"""One response a prompt. There is no group, so the mean is that of all responses of the iteration."""
FIXED: dict[str, Any] = {"beta": (0.25,), "lr": (1e-3,), "k": (4,)}
"""One point: for a study that varies something else."""


def ladder() -> tuple[Method, ...]:
    """ReVal's recipe, one step after the other, and with one part taken away."""
    taper, beta, k = RECIPE[0], "objective.beta=0.25", "replay.updates_per_iteration"
    whole = (*FOLLOWING, *RECIPE, beta)
    steps = {
        "0/1 rewards, reference fixed": ("reward.shaping=plain", "objective.beta=0.1"),
        "normalized, following": (*FOLLOWING, "objective.beta=0.5"),
        "+ tapered": (*FOLLOWING, taper, beta),
        "+ no gradient through V (the recipe)": whole,
        "the recipe without V": (*FOLLOWING, "objective.name=benchmarks/study/variants.py:no_v", beta),
        "the recipe, K = 1": (*whole, f"{k}=1"),
        "the recipe, K = 2": (*whole, f"{k}=2"),
        "the recipe, K = 8": (*whole, f"{k}=8"),
        "the recipe, reset every 4": (*whole[:1], *RECIPE[1:], beta, "reference.reset_every=4"),
    }
    return tuple(
        Method(name=name, overrides=(f"{k}=4", *own), grid={"optim.lr": RATES[1:2]}) for name, own in steps.items()
    )


def siblings() -> tuple[Method, ...]:
    """Other methods that learn from responses of older policies."""
    following = {"TOPR": "topr", "AsymRE": "asymre", "Kimi K2.5": "kimi", "TBA": "tba", "Kimi k1.5": "regression"}
    own = {
        "AsymRE": ("objective.baseline_shift=0.3",),
        "Kimi K2.5": ("objective.beta=0.01",),
        "TBA": ("replay.draw=groups", "objective.beta=0.25"),
        "Kimi k1.5": ("reward.shaping=centered", "objective.beta=0.25"),
    }
    return tuple(policy_gradient(name, one, *own.get(name, ()), k=(4,), lr=(1e-3,)) for name, one in following.items())


def one_prompt(name: str) -> Study:
    return Study(
        name=name,
        task=TASKS[name],
        methods=(
            *(reval(f"ReVal, K = {k}", **FIXED | {"k": (k,)}) for k in (1, 2, 4, 8)),
            *(policy_gradient(f"GRPO, K = {k}", "grpo", lr=(1e-3,), k=(k,)) for k in (1, 2, 4, 8)),
        ),
        trials=1,
        rungs=(),
        overrides=("run.iterations=24",),
    )


def offline() -> tuple[Method, ...]:
    """Learning from logged responses of the base model alone. ReVal's reference is the base model, always."""
    fixed = ("reward.shaping=normalized", "replay.updates_per_iteration=1")
    return (
        Method(name="ReVal", overrides=fixed, grid={"objective.beta": (0.25, 0.5), "optim.lr": RATES[:2]}),
        Method(
            name="ReVal, 0/1 rewards",
            overrides=(*fixed, "reward.shaping=plain"),
            grid={"objective.beta": (0.1, 0.2), "optim.lr": RATES[:2]},
        ),
        policy_gradient("GRPO", "grpo", k=(1,), lr=RATES[:2]),
        policy_gradient("TOPR", "topr", k=(1,), lr=RATES[:2]),
    )


def _short(name: str, task: str, methods: Sequence[Method], trials: int = 2, *overrides: str, **more: Any) -> Study:
    return Study(
        name=name,
        task=TASKS[task],
        methods=tuple(methods),
        trials=trials,
        overrides=(*SHORT, *overrides),
        **{"rungs": (1,)} | more,
    )


STUDIES = {
    study.name: study
    for study in (
        _short(
            "methods",
            "sums",
            (reval(), paper(k=(4, 8)), *grpo(), policy_gradient("TOPR", "topr")),
            4,
            rungs=(1, 2),
        ),
        _short("rare", "rare", (reval(k=(4,)), *grpo(k=(4,)))),
        _short(
            "long",
            "long",
            (
                reval(k=(4,), lr=STEEP, beta=(0.1,)),
                policy_gradient("GRPO, K = 1", "grpo", k=(1,), lr=(1.5e-3, 3e-3)),
                policy_gradient("GRPO with replay", "grpo", k=(4,), lr=STEEP),
                policy_gradient("TOPR", "topr", k=(4,), lr=STEEP),
            ),
        ),
        _short(
            "one-response",
            "sums",
            (
                reval("ReVal", *SINGLE, k=(4,)),
                paper(*SINGLE, k=(4,), lr=(1e-3,)),
                *grpo(*SINGLE, k=(4,)),
            ),
        ),
        _short("ahead-1", "sums", (reval(k=(4,)), *grpo(k=(4,))), 2, "rollout.ahead=1"),
        _short("ahead-8", "sums", (reval(k=(4,)), *grpo(k=(4,))), 2, "rollout.ahead=8"),
        Study(name="offline", task=TASKS["offline"], methods=offline(), trials=2, rungs=(1,)),
        _short("ladder", "sums", ladder(), 1, rungs=()),
        Study(
            name="calibrated",
            task=TASKS["silent"],
            methods=tuple(
                Method(
                    name=name,
                    overrides=("reward.shaping=plain", f"objective.name={objective}"),
                    grid={"optim.lr": (1e-3,)},
                )
                for name, objective in (("ReVal", "reval"), ("TBRM", "tbrm"))
            ),
            trials=1,
            rungs=(),
            levels=(0.01, 0.1, 1.0),
            overrides=("run.iterations=20", "evaluation.every=0"),
        ),
        _short("siblings", "sums", siblings(), 1, rungs=(), seeds=2),
        *map(one_prompt, ("one-easy", "one-medium", "one-hard")),
        Study(
            name="demo-replay",
            task=TASKS["demo"],
            methods=(policy_gradient("GRPO with replay", "grpo", lr=(3e-5, 6e-5), k=(4,)),),
            trials=2,
            rungs=(1,),
            overrides=("run.iterations=6",),
        ),
        Study(
            name="demo",
            task=TASKS["demo"],
            methods=(
                reval(k=(4,), beta=(0.25,), lr=(3e-5, 6e-5)),
                policy_gradient("GRPO, K = 1", "grpo", lr=(3e-5, 6e-5), k=(1,)),
            ),
            trials=2,
            rungs=(1,),
            overrides=("run.iterations=6",),
        ),
    )
}
