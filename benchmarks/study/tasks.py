"""The tasks of the studies: a base model, problems and a reward, as settings of the trainer."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from .models import Recipe, base_model, locked, questions

REWARD = "benchmarks.study.rewards:exact"
FAST = (  # what every fast task has in common; a study may override it
    "data.source=jsonl",
    "data.held_out=0",  # null for the fast tasks: the held-out problems are a file
    f"reward.function={REWARD}",
    "rollout.engine=hf",
    "rollout.prompts=8",
    "rollout.responses=8",
    "rollout.batch_size=1024",
    "replay.capacity=640",
    "optim.betas=[0.9, 0.95]",
    "evaluation.every=2",
    "evaluation.samples=16",  # of 40 held-out problems: a standard error of 0.02 at most
    "evaluation.greedy=false",
    "run.iterations=60",
)
ONE = ("rollout.prompts=1", "rollout.responses=64", "evaluation.every=0", "rollout.max_new_tokens=17")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task, as settings of the trainer."""

    name: str
    start: tuple[float, float]
    """The success rate before training: the smallest and the largest."""
    recipe: Recipe | None = None
    """The base model. None: that of the config files."""
    files: tuple[str, ...] = ()
    """Config files."""
    overrides: tuple[str, ...] = ()
    question: str | None = None
    """The only training prompt. None: all questions of the family but the held-out ones."""
    metric: str = "eval/accuracy"
    """The accuracy of an iteration in metrics.jsonl. `reward`: the mean score of its fresh rollouts, which the policy
    before the iteration's updates generated."""
    held_out: int = 40
    logged: int = 0
    """Training generates nothing and uses this many logged responses of the base model. 0: training generates."""

    def settings(self, folder: Path) -> list[str]:
        """The overrides. Makes the base model and the problem files in `folder`, if they are not there."""
        if self.recipe is None:
            return list(self.overrides)
        model, problems = base_model(self.recipe, folder), folder / "problems" / self.name
        asked = questions(self.recipe.family)
        if self.question is not None:
            paths = [f"data.path={_write(problems / 'train.jsonl', [a for a in asked if a[0] == self.question])}"]
        else:
            random.Random(0).shuffle(asked)
            paths = [
                f"data.path={_write(problems / 'train.jsonl', asked[self.held_out :])}",
                f"data.held_out_path={_write(problems / 'held_out.jsonl', asked[: self.held_out])}",
            ]
        own = [*FAST, f"model.name={model}", *paths, *self.overrides]
        return own + [f"replay.preload={_log(self.logged, model, folder, own)}"] if self.logged else own


def _log(count: int, model: Path, folder: Path, settings: list[str]) -> Path:
    """A file of `count` responses of the base model. The trainer makes it, with a step of no length."""
    path = folder / "problems" / f"log-{model.name}-{count}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path):
        if not path.exists():
            from reval.config import load_config  # here, because worker processes import this module too
            from reval.loop import train

            run = path.with_suffix(".run")
            ours = ("rollout.engine=hf", f"run.iterations={count // 64}", f"run.dir={run}", "tracking.rollouts=true")
            quiet = ("run.threads=1", "run.display=plain", "run.save_every=0", "run.overwrite=true")
            short = ("optim.lr=1e-12", "evaluation.every=0", "evaluation.samples=1", "replay.batch_size=null")
            train(load_config([], [*settings, *ours, *quiet, *short]))
            (run / "rollouts.jsonl").rename(path)
            shutil.rmtree(run)
    return path


def _write(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write problems, unless the file has them: a run of another study may read it at this moment."""
    text = "".join(json.dumps({"prompt": question, "answer": answer}) + "\n" for question, answer in rows)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(text)
        unfinished.replace(path)
    return path


def _one(name: str, bare: float, start: tuple[float, float]) -> Task:
    recipe = Recipe(family="sums", bare=bare)
    return Task(name=name, start=start, recipe=recipe, question="47+8=", overrides=ONE, metric="reward")


TASKS = {
    task.name: task
    for task in (
        Task(
            name="sums",
            start=(0.03, 0.07),
            recipe=Recipe(family="sums", bare=0.06),
            overrides=("rollout.max_new_tokens=17",),
        ),
        Task(
            name="rare",
            start=(0.007, 0.025),
            recipe=Recipe(family="sums", bare=0.018),
            overrides=("rollout.max_new_tokens=17",),
        ),
        Task(
            name="long",
            start=(0.03, 0.12),
            recipe=Recipe(family="count", right=0.82, steps=800),
            overrides=("rollout.max_new_tokens=42", "evaluation.every=4"),
        ),
        Task(
            name="offline",
            start=(0.03, 0.07),
            recipe=Recipe(family="sums", bare=0.06),
            logged=2048,
            overrides=(
                "rollout.engine=none",
                "rollout.max_new_tokens=17",
                "replay.batch_size=64",
                "replay.capacity=2048",
                "evaluation.every=8",
                "run.iterations=128",
                "optim.schedule=linear",
            ),
        ),
        Task(
            name="silent",
            start=(0.03, 0.07),
            recipe=Recipe(family="sums", bare=0.06),
            overrides=("rollout.max_new_tokens=17", "reward.function=benchmarks.study.rewards:nothing"),
            metric="reval/log_ratio",
        ),
        _one("one-easy", 0.35, (0.2, 0.4)),
        _one("one-medium", 0.06, (0.03, 0.08)),
        _one("one-hard", 0.012, (0.005, 0.02)),
        Task(
            name="demo",
            start=(0.0, 0.1),
            files=("configs/demo.yaml",),
            overrides=("evaluation.every=1", "evaluation.greedy=false"),
        ),
    )
}
