"""What a run records: metrics.jsonl, TensorBoard events, sampled completions, curves.png."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .config import Config
from .evaluate import Evaluation


class Tracker:
    """Writes into the run folder, flushing every line, so that a killed run keeps what it measured."""

    def __init__(self, folder: Path, config: Config):
        self._folder, self._config = folder, config
        self._metrics = open(folder / "metrics.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._samples = open(folder / "samples.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        self._updates: dict[str, list[dict[str, Any]]] = {}
        self._rows: list[dict[str, float]] = []
        self._evaluations: list[tuple[int, float]] = []
        self._tokens = 0
        self._events = None
        if config.tracking.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._metrics.close()
        self._samples.close()
        if self._events is not None:
            self._events.close()

    def update(self, prefix: str, update: dict[str, Any]) -> None:
        """Keep what one update returned until `log`; prefix `reval` for fresh batches, `reval/replay` for replayed."""
        self._updates.setdefault(prefix, []).append(update)

    def evaluated(self, iteration: int, evaluation: Evaluation | None) -> dict[str, float]:
        """The evaluation's metrics; the accuracy is kept for the plot."""
        if evaluation is None:
            return {}
        metrics = evaluation.metrics()
        self._evaluations.append((iteration, metrics["eval/accuracy"]))
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, iteration)
        return metrics

    def samples(self, iteration: int, rows: list[tuple[Any, str, float | None]]) -> None:
        """Save the first few (prompt, completion, score) of the iteration."""
        for prompt, completion, score in rows[: self._config.tracking.samples]:
            row = {"iteration": iteration, "prompt": prompt, "completion": completion, "score": score}
            self._samples.write(json.dumps(row) + "\n")
        self._samples.flush()

    def reward_error(self, iteration: int, error: str) -> None:
        """Append an exception of the reward function to reward_errors.txt."""
        with open(self._folder / "reward_errors.txt", "a", encoding="utf-8") as file:
            file.write(f"iteration {iteration}\n{error}\n\n")

    def log(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Write one iteration: `metrics`, and the means of what its updates returned. Returns the whole."""
        self._tokens += int(metrics["num_tokens"])
        seconds = metrics.get("time/rollout", 0.0)
        row = {"iteration": iteration, **metrics, **_summary(self._updates)}
        row["rollout/tokens_per_second"] = metrics["num_tokens"] / seconds if seconds else 0.0
        row["num_tokens"] = self._tokens
        self._updates = {}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        self._rows.append(row)
        if self._events is not None:
            for name, value in row.items():
                self._events.add_scalar(name, value, iteration)
        return row

    def plot(self) -> None:
        """Draw curves.png from what was logged."""
        if self._rows:
            from .plots import save_curves

            save_curves(self._folder / "curves.png", self._rows, self._evaluations)


def _summary(updates: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Means over the updates of one kind: loss, grad_norm, lr, and the parts of their residuals."""
    out: dict[str, float] = {}
    for prefix, done in updates.items():
        top = "" if prefix == "reval" else "replay/"
        for key in ("loss", "grad_norm", "lr"):
            out[top + key] = sum(u[key] for u in done) / len(done)
        parts = {key: torch.cat([u["parts"][key] for u in done]) for key in done[0]["parts"]}
        residual = parts.pop("residual")
        out[f"{prefix}/residual_mean"] = residual.mean().item()
        out[f"{prefix}/residual_abs"] = residual.abs().mean().item()
        out[f"{prefix}/residual_p95"] = residual.abs().quantile(0.95).item()
        out |= {f"{prefix}/{key}": x.mean().item() for key, x in parts.items()}
    return out
