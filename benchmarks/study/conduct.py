"""Conducts a study: prepares the task, searches, runs the best trials with fresh seeds, and writes the results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reval.config import Config

from ..report import stamp
from .cells import Cell, make
from .curves import Point, area, read
from .halving import budget, search
from .report import EVIDENCE, PAGE, RESULTS, draw, fill, findings, merge, table
from .runner import Runner
from .studies import Study, Trial

FRESH = 100
"""The first of the seeds with which the best trials are compared. The search uses 0, 1, ..."""


class Cells:
    """The cells of a study: makes them from trials and seeds, runs them and reads their curves."""

    def __init__(self, study: Study, folder: Path, extra: Sequence[str], runner: Runner):
        self._study, self._folder, self._extra, self._runner = study, folder, extra, runner
        self._task = study.task.settings(folder)

    def cell(self, trial: Trial, seed: int) -> Cell:
        method = self._study.method(trial.method)
        settings = [*self._task, *self._study.overrides, *method.overrides, *trial.overrides, *self._extra]
        label = f"{self._study.name}: {trial.method} {' '.join(trial.overrides)} seed {seed}"
        return make(self._folder, self._study.task.files, [*settings, f"run.seed={seed}"], label=label)

    def run(self, wanted: list[tuple[Trial, int]]) -> list[list[Point]]:
        """The curve of each pair (trial, seed). A run that failed has none: []."""
        cells = [self.cell(trial, seed) for trial, seed in wanted]
        results = self._runner.run(cells)
        return [
            read(cell.folder, self._study.task.metric, _rollouts(cell.config)) if result["status"] == "complete" else []
            for cell, result in zip(cells, results, strict=True)
        ]


def conduct(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Run the study and write evidence.json, the table and the picture to args.output. Returns the entry."""
    start = time.monotonic()
    trials = {method.name: method.trials(study.trials) for method in study.methods}
    total = len(trials) * (budget(study.trials, study.rungs) + study.seeds)
    print(f"{study.name}: {len(trials)} methods, {study.trials} trials each, {total} runs", flush=True)
    with Runner(args.jobs, total, retry=args.retry, say=lambda line: print(line, flush=True)) as runner:
        cells = Cells(study, args.folder, args.settings, runner)
        best, scores = search(trials, study.rungs, lambda wanted: [area(run) for run in cells.run(wanted)])
        seeds = range(FRESH, FRESH + study.seeds)
        pairs = [(best[name], seed) for name in trials for seed in seeds]
        runs: dict[str, list[list[Point]]] = {name: [] for name in trials}
        for (trial, _), run in zip(pairs, cells.run(pairs), strict=True):
            runs[trial.method].append(run)
    found = {
        "task": study.task.name,
        "settings": [*study.overrides, *args.settings],
        "trials": study.trials,
        "seeds of each rung": list(study.rungs),
        "runs of each method": budget(study.trials, study.rungs) + study.seeds,
        "seconds": round(time.monotonic() - start),
        "stamp": stamp(torch.device("cpu")) | {"jobs": args.jobs},
        "methods": {
            name: {
                "settings": list(best[name].overrides),
                "seeds": list(seeds),
                **findings(own, study.levels),
                "search": [
                    {"settings": list(t.overrides), "areas": [round(s, 4) for s in scores[t]]} for t in trials[name]
                ],
            }
            for name, own in runs.items()
        },
    }
    merge(args.output / EVIDENCE, study.name, found)
    draw(args.output / f"study-{study.name}.png", f"{study.name} ({study.task.name})", study.task.metric, runs)
    print("\n".join(table(found)))
    if args.output == RESULTS:
        fill(PAGE, RESULTS / EVIDENCE)
    print(f"written: {args.output / EVIDENCE}, {args.output}/study-{study.name}.png")
    return found


def _rollouts(config: Config) -> int:
    """Number of responses that an iteration generates. Without generation: that it draws from the log."""
    return config.trajectories_per_iteration or config.replay_batch_size * config.replay.updates_per_iteration
