"""Held-out accuracy: sampled and greedy answers to problems that training never sees."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .config import Config
from .data import Problem, Prompt
from .rewards import RewardPool, Scores
from .rollout import Response, RolloutEngine


@dataclass(frozen=True, slots=True)
class Answered:
    """One problem and what the model answered."""

    prompt: Prompt
    sampled: list[str]
    scores: list[float | None]
    """Of the sampled answers; None where the reward function could not score."""
    greedy: str | None = None
    greedy_score: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Answers to all held-out problems."""

    answers: list[Answered]

    def metrics(self) -> dict[str, float]:
        """`eval/accuracy`: mean score of the sampled answers (avg@k); `eval/accuracy_greedy`. An answer that cannot be
        scored counts as 0."""
        sampled = [s or 0.0 for a in self.answers for s in a.scores]
        out = {"eval/accuracy": sum(sampled) / max(len(sampled), 1)}
        if any(a.greedy is not None for a in self.answers):
            out["eval/accuracy_greedy"] = sum(a.greedy_score or 0.0 for a in self.answers) / len(self.answers)
        return out

    def save(self, path: Path) -> None:
        """One JSON object a problem."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(a)) + "\n" for a in self.answers), encoding="utf-8")


def evaluate(
    rollout: RolloutEngine,
    problems: list[Problem],
    pool: RewardPool,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> Evaluation:
    """Answer the held-out problems, always with the same seed."""
    settings = config.evaluation
    kinds = [(settings.samples, settings.temperature)] + ([(1, 0.0)] if settings.greedy else [])
    texts, scores = [], []
    for count, temperature in kinds:
        groups = rollout.generate(
            [p.token_ids for p in problems], responses=count, max_new_tokens=config.rollout.max_new_tokens,
            temperature=temperature, seed=config.run.seed,
        )  # fmt: skip
        flat = [(p, r) for p, group in zip(problems, groups, strict=True) for r in group]
        text = decode([r for _, r in flat], tokenizer)
        scored = score([p for p, _ in flat], text, [r.token_ids for _, r in flat], pool)
        texts.append([text[i : i + count] for i in range(0, len(text), count)])
        scores.append([scored.rewards[i : i + count] for i in range(0, len(text), count)])
    answers = [Answered(p.prompt, t, s) for p, t, s in zip(problems, texts[0], scores[0], strict=True)]
    if settings.greedy:
        best = zip(answers, texts[1], scores[1], strict=True)
        answers = [replace(a, greedy=text[0], greedy_score=score[0]) for a, text, score in best]
    return Evaluation(answers)


def decode(responses: list[Response], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the reward function and people read; training uses the token ids."""
    return tokenizer.batch_decode([r.token_ids for r in responses], skip_special_tokens=True)


def score(problems: list[Problem], texts: list[str], token_ids: list[list[int]], pool: RewardPool) -> Scores:
    """Scores of one completion for each of the problems (a problem may come several times)."""
    names = sorted({name for p in problems for name in p.columns})
    columns = {name: [p.columns.get(name) for p in problems] for name in names}
    return pool.score([p.prompt for p in problems], texts, token_ids, columns)


def main(config: Config, checkpoint: Path) -> int:
    """`reval evaluate CHECKPOINT`: answer the held-out problems with a checkpoint and save the answers beside it."""
    from .parts import build

    folder = checkpoint / "checkpoint" if (checkpoint / "checkpoint").exists() else checkpoint
    config = replace(config, model=replace(config.model, name=str(folder)))
    with build(config) as parts:
        result = evaluate(parts.rollout, parts.held_out, parts.pool, parts.tokenizer, config)
    result.save(folder / "evaluation.jsonl")
    print(json.dumps(result.metrics() | {"problems": len(result.answers), "answers": str(folder / "evaluation.jsonl")}))
    return 0
