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
    """One problem and what the model answered. The lists have one entry per sampled answer."""

    prompt: Prompt
    sampled: list[str]
    scores: list[float | None]
    """None where the reward function could not score."""
    greedy: str | None = None
    greedy_score: float | None = None
    benchmark: str | None = None
    """None: a held-out problem."""
    answer: Any = None
    """What the data set says is right, where it says so."""
    extracted: list[str | None] | None = None
    """The final answers, for maj@k; None where the reward function does not say how to find them."""
    lengths: list[int] = field(default_factory=list)
    """In tokens, the end-of-sequence token included."""
    finished: list[bool] = field(default_factory=list)
    """False where the length limit cut the answer off."""
    endogenous: list[float] | None = None
    """Sums of endogenous rewards, for best@k."""

    @property
    def score(self) -> float:
        """Mean score of the sampled answers; one that could not be scored counts as 0."""
        return mean([s or 0.0 for s in self.scores])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers to all problems, those of one set together."""

    answers: list[Answered]
    k: tuple[int, ...] = ()
    """The k of pass@k, maj@k and best@k; empty: as many as there are answers to a problem."""

    def metrics(self) -> dict[str, float]:
        """`eval/accuracy` (avg@k), `eval/accuracy_greedy`, `eval/pass@4` ... of the held-out problems, and
        `eval/<benchmark>/avg@16`, `eval/<benchmark>/pass@4` ... of each benchmark; `eval/benchmarks/avg@16` is the mean
        over several. Without held-out problems `eval/accuracy` is that mean."""
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
        """What `save` wrote."""
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return cls([Answered(**{k: v for k, v in row.items() if k != "score"}) for row in rows])

    def save(self, path: Path) -> None:
        """One JSON object a problem; `reval compare` reads it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(asdict(a) | {"score": a.score}, default=str) + "\n" for a in self.answers)
        path.write_text(text, encoding="utf-8")


def _metrics(answers: list[Answered], k: tuple[int, ...]) -> tuple[float, float | None, dict[str, float]]:
    """Of one set: mean score, mean greedy score, and the rest by name."""
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
