"""The answers to evaluation problems, their metrics, and the file that holds them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data import Prompt
from .estimators import best, majority, mean, over_blocks, pass_at_k


@dataclass(frozen=True, slots=True)
class Answered:
    """A problem and the model's answers to it. Each list has one entry per sampled answer."""

    prompt: Prompt
    sampled: list[str]
    scores: list[float | None]
    """None if the reward function could not score the answer."""
    greedy: str | None = None
    greedy_score: float | None = None
    benchmark: str | None = None
    """The name of the benchmark. None for a held-out problem."""
    answer: Any = None
    """The right answer from the data set, if it has one."""
    extracted: list[str | None] | None = None
    """The final answer in each text, for maj@k. None if the reward function has no extractor."""
    lengths: list[int] = field(default_factory=list)
    """Number of tokens of each answer, the end-of-sequence token included."""
    finished: list[bool] = field(default_factory=list)
    """False if the length limit cut the answer off."""
    endogenous: list[float] | None = None
    """The sum of endogenous rewards of each answer, for best@k."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings that the score depends on: samples, temperature, max_new_tokens and reward. `reval compare` refuses
    different ones."""

    @property
    def score(self) -> float:
        """The mean score of the sampled answers. An answer without a score counts as 0."""
        return mean([s or 0.0 for s in self.scores])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The answers to all evaluation problems."""

    answers: list[Answered]
    """The problems of one set (the held-out ones, or a benchmark) are neighbours."""
    k: tuple[int, ...] = ()
    """The k of pass@k, maj@k and best@k. Empty: one k, the number of answers to a problem."""

    def metrics(self) -> dict[str, float]:
        """The metrics by name.

        The held-out problems have `eval/accuracy` (the mean score), `eval/accuracy_greedy`, `eval/pass@4`, ... Each
        benchmark has `eval/<benchmark>/avg@16` (the mean score), `eval/<benchmark>/pass@4`, ... With several benchmarks
        `eval/benchmarks/avg@16` is the mean over them. Without held-out problems `eval/accuracy` is that mean.
        """
        sets: dict[str | None, list[Answered]] = {}
        for a in self.answers:
            sets.setdefault(a.benchmark, []).append(a)
        out: dict[str, float] = {}
        means = []
        for name, answers in sets.items():
            score, greedy, rest = _metrics(answers, self.k)
            top = "eval" if name is None else f"eval/{name}"
            samples = len(answers[0].scores)
            out[f"{top}/accuracy" if name is None else f"{top}/avg@{samples}"] = score
            if greedy is not None:
                out[f"{top}/accuracy_greedy" if name is None else f"{top}/greedy"] = greedy
            out |= {f"{top}/{key}": value for key, value in rest.items()}
            means += [] if name is None else [score]
        if len(means) > 1:
            out[f"eval/benchmarks/avg@{len(self.answers[0].scores)}"] = mean(means)
        return {"eval/accuracy": mean(means)} | out

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read the file that `save` wrote."""
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls([Answered(**{k: v for k, v in row.items() if k != "score"}) for row in rows])

    def save(self, path: Path) -> None:
        """Write one JSON object per problem. `reval compare` reads this file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_jsonl(), encoding="utf-8")

    def to_jsonl(self) -> str:
        """The text of the file that `save` writes."""
        return "".join(json.dumps(asdict(a) | {"score": a.score}, default=str) + "\n" for a in self.answers)


def _metrics(answers: list[Answered], k: tuple[int, ...]) -> tuple[float, float | None, dict[str, float]]:
    """The metrics of one set: the mean score, the mean score of the greedy answers, and the others by name."""
    rest: dict[str, float] = {}
    for n in k or (len(answers[0].scores),):
        rest[f"pass@{n}"] = mean([pass_at_k(a.scores, n) for a in answers])
        if all(a.extracted is not None for a in answers):
            rest[f"maj@{n}"] = mean([over_blocks(majority, n, a.extracted or [], a.scores) for a in answers])
        if all(a.endogenous is not None for a in answers):
            rest[f"best@{n}"] = mean([over_blocks(best, n, a.endogenous or [], a.scores) for a in answers])
    if all(a.lengths for a in answers):
        rest["mean_length"] = mean([n for a in answers for n in a.lengths])
        rest["clipped_ratio"] = mean([not done for a in answers for done in a.finished])
    greedy = mean([a.greedy_score or 0.0 for a in answers]) if any(a.greedy is not None for a in answers) else None
    return mean([a.score for a in answers]), greedy, rest
