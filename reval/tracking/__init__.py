"""What a run records: metrics.jsonl, samples.jsonl, reward_errors.txt, curves.png, and the services of `services`."""

from __future__ import annotations

import json
import re
import textwrap
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from ..config import Config
from ..evaluate import Evaluation
from .services import Service, check_installed, start

__all__ = ["Tracker", "check_installed"]

FILES = ("metrics.jsonl", "samples.jsonl")


class Tracker:
    """Writes into the run folder, flushing every line, so that a killed run keeps what it measured.

    Args:
        folder: the run's.
        config: its settings.
        iteration: the last iteration of the checkpoint that the run goes on from; 0 for a new run. Of the files only
            what belongs to iterations up to it is kept, so that in the end they are those of an uninterrupted run.
        state: what `state()` returned when that checkpoint was made.
        main: False on all processes but one, which writes: `log` returns the same row and nothing is written.

    Raises:
        ConfigError: a tracking service's package is not installed, or the service cannot start.
    """

    def __init__(
        self, folder: Path, config: Config, iteration: int = 0, state: dict[str, Any] | None = None, main: bool = True
    ):
        self._folder, self._config, self._main = folder, config, main
        self._updates: dict[str, list[dict[str, Any]]] = {}
        self._samples: list[dict[str, Any]] = []
        kept = {name: _lines_until(folder / name, iteration) for name in FILES}
        self._rows: list[dict[str, float]] = [json.loads(line) for line in kept["metrics.jsonl"]]
        state = state or {
            "tokens": self._rows[-1]["num_tokens"] if self._rows else 0,
            "evaluations": [(r["iteration"], r["eval/accuracy"]) for r in self._rows if "eval/accuracy" in r],
            "runs": {},
        }
        self._tokens = int(state["tokens"])
        self._evaluations: list[tuple[int, float]] = [(int(i), accuracy) for i, accuracy in state["evaluations"]]
        self._runs: dict[str, str] = dict(state["runs"])
        self._files: dict[str, TextIO] = {}
        self._services: dict[str, Service] = {}
        if main:
            self._services = start(folder, config, iteration, self._runs)
            self._runs |= {name: service.run for name, service in self._services.items() if service.run}
            for name, lines in kept.items():
                _replace(folder / name, "".join(line + "\n" for line in lines))
                self._files[name] = open(folder / name, "a", encoding="utf-8")
            _keep_errors_until(folder / "reward_errors.txt", iteration)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        for service in self._services.values():
            service.close(failed=error is not None)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to resume the tracker after the iterations logged so far, as JSON takes it."""
        return {"tokens": self._tokens, "evaluations": list(self._evaluations), "runs": dict(self._runs)}

    def update(self, prefix: str, update: dict[str, Any]) -> None:
        """Keep what one update returned until `log`; prefix `reval` for fresh batches, `reval/replay` for replayed."""
        self._updates.setdefault(prefix, []).append(update)

    def evaluated(self, iteration: int, evaluation: Evaluation | None) -> dict[str, float]:
        """The evaluation's metrics; the accuracy is kept for the plot. What is measured before the first iteration goes
        to the services at once, since no row of `log` will hold it."""
        if evaluation is None:
            return {}
        metrics = evaluation.metrics()
        self._evaluations.append((iteration, metrics["eval/accuracy"]))
        if iteration == 0:
            self._send(0, metrics, [])
        return metrics

    def samples(self, iteration: int, rows: list[tuple[Any, str, float | None]]) -> None:
        """Save the first few (prompt, completion, score) of the iteration."""
        self._samples = [
            {"iteration": iteration, "prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in rows[: self._config.tracking.samples]
        ]
        self._write("samples.jsonl", self._samples)

    def reward_error(self, iteration: int, error: str) -> None:
        """Append an exception of the reward function to reward_errors.txt."""
        if self._main:
            with open(self._folder / "reward_errors.txt", "a", encoding="utf-8") as file:
                file.write(f"iteration {iteration}\n{textwrap.indent(error, '  ')}\n\n")

    def log(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Write one iteration: `metrics`, and the means of what its updates returned. Returns the whole."""
        self._tokens += int(metrics["num_tokens"])
        seconds = metrics.get("time/rollout", 0.0)
        row = {"iteration": iteration, **metrics, **_summary(self._updates)}
        row["rollout/tokens_per_second"] = metrics["num_tokens"] / seconds if seconds else 0.0
        row["num_tokens"] = self._tokens
        self._write("metrics.jsonl", [row])
        self._rows.append(row)
        self._send(iteration, row, self._samples)
        self._updates, self._samples = {}, []
        return row

    def plot(self) -> None:
        """Draw curves.png from what was logged."""
        if self._rows and self._main:
            from ..plots import save_curves

            save_curves(self._folder / "curves.png", self._rows, self._evaluations)

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._main:
            self._files[name].writelines(json.dumps(row) + "\n" for row in rows)
            self._files[name].flush()

    def _send(self, iteration: int, row: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Log to every service. One that fails is dropped with a warning: days of training are worth more."""
        for name, service in list(self._services.items()):
            try:
                service.log(iteration, row, samples)
            except Exception as error:
                del self._services[name]
                warnings.warn(
                    f"tracking.{name} failed in iteration {iteration} ({type(error).__name__}: {error}); nothing more "
                    "goes there, metrics.jsonl goes on",
                    stacklevel=3,
                )


def _lines_until(path: Path, iteration: int) -> list[str]:
    """The lines of a JSONL file whose `iteration` is not beyond the given one. They are in order: the first that is
    beyond it, or that kill -9 left half-written, ends them."""
    kept: list[str] = []
    if iteration and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                if json.loads(line)["iteration"] > iteration:
                    break
            except ValueError:
                break
            kept.append(line)
    return kept


def _keep_errors_until(path: Path, iteration: int) -> None:
    """The same for reward_errors.txt, whose entries begin with a line `iteration N`."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        beyond = [m.start() for m in re.finditer(r"^iteration (\d+)$", text, re.M) if int(m[1]) > iteration]
        kept = text[: beyond[0]] if beyond else text
        _replace(path, kept[: kept.rfind("\n\n") + 2])  # a torn entry has no end


def _replace(path: Path, text: str) -> None:
    """Write the file as a whole or not at all: a run may be killed while it is being resumed."""
    unfinished = path.with_name(f".{path.name}-unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


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
