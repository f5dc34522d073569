"""The names of all metrics of a row of metrics.jsonl, known before the run logs one."""

from __future__ import annotations

import difflib

from .config import Config, ConfigError
from .data import Problem
from .evaluation.answers import Answered, Evaluation

UPDATES = ("loss", "grad_norm", "lr", "skipped")
RESIDUALS = ("residual_mean", "residual_abs", "residual_p95", "v_policy", "v_reference", "log_ratio")
GENERATED = (
    *("reward", "reward_std", "frac_reward_zero_std", "reward_unscored", "reward_timeouts", "reward_errors"),
    *("completions/mean_length", "completions/max_length", "completions/clipped_ratio", "num_tokens"),
    *("rollout/lag", "rollout/tokens_per_second", "rollout/mismatch_mean", "rollout/mismatch_max"),
    *("time/rollout", "time/reward", *UPDATES),
    *(f"reval/{name}" for name in RESIDUALS),
    "reval/value_lag",
)
"""The metrics of fresh responses, which a run with rollout.engine=none does not have."""
TRAINING = (
    *GENERATED,
    *("buffer/size", "buffer/age_mean", "buffer/reuse_mean", "reference/version", "step_time"),
    *(f"time/{stage}" for stage in ("reference", "update", "sync")),
    *(f"replay/{name}" for name in UPDATES),
    *(f"reval/replay/{name}" for name in RESIDUALS),
)
"""The metrics of every iteration, without those of evaluations."""


def check_best_metric(config: Config, evaluation_problems: list[Problem]) -> None:
    """Raise ConfigError if no iteration logs run.best_metric."""
    name, evaluated = config.run.best_metric, evaluation_names(config, evaluation_problems)
    missing = set() if config.generates else set(GENERATED)
    if config.objective.name != "reval":
        missing.add("reval/value_lag")
    known = [*evaluated, *(n for n in TRAINING if n not in missing)]
    if name is None or name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    there = ", ".join(evaluated) or "none, because there are no held-out problems and no benchmarks"
    raise ConfigError(
        f"run.best_metric must be a metric that the run logs; got {name!r}{hint} The metrics of its evaluations: "
        f"{there}"
    )


def evaluation_names(config: Config, problems: list[Problem]) -> list[str]:
    """The names of the metrics that an evaluation with these problems gives: those of made-up answers. `maj@k` is among
    them, although your own reward function may have no extractor and then gives none."""
    settings = config.evaluation
    n = settings.samples
    answers = []
    for benchmark in dict.fromkeys(p.benchmark for p in problems):
        problem = next(p for p in problems if p.benchmark == benchmark)
        answers.append(
            Answered(
                problem.prompt,
                sampled=[""] * n,
                scores=[0.0] * n,
                greedy="" if settings.greedy else None,
                benchmark=benchmark,
                extracted=[None] * n,
                lengths=[1] * n,
                finished=[True] * n,
                endogenous=[0.0] * n if settings.best_of_n else None,
            )
        )
    return list(Evaluation(answers, tuple(settings.k)).metrics()) if answers else []
