"""Records a run: metrics.jsonl, samples.jsonl, reward_errors.txt, curves.png, and the services in `services.py`."""

from __future__ import annotations

import json
import re
import textwrap
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from ..advice import value_lag
from ..config import Config
from ..evaluation.answers import Evaluation
from .services import Service, check_installed, start

__all__ = ["Tracker", "check_installed"]

ROLLOUTS = "rollouts.jsonl"


class Tracker:
    """Writes files into the run folder. Every line is flushed, so that a killed run keeps its metrics and samples.

    Args:
        folder: the run folder.
        config: settings of the run.
        iteration: last iteration of the checkpoint that the run resumes; 0 for a new run. Entries of later iterations
            are removed from the files, so that the files end up equal to those of an uninterrupted run.
        state: the value that `state()` returned when the checkpoint was saved.
        main: True on one process of the run, which writes the files. On the others, `log` returns the same row, and
            nothing is written.

    Raises:
        ConfigError: the package of a tracking service is not installed, or the service cannot start.
    """

    def __init__(
        self, folder: Path, config: Config, iteration: int = 0, state: dict[str, Any] | None = None, main: bool = True
    ):
        self._folder, self._config, self._main = folder, config, main
        self._updates: dict[str, list[dict[str, Any]]] = {}
        self._samples: list[dict[str, Any]] = []
        self.logged = (state or {}).get("logged", iteration)
        """The last iteration that has a row in metrics.jsonl. A checkpoint that was saved before the evaluation of its
        iteration has this iteration's samples but no row."""
        kept = {
            "metrics.jsonl": _lines_until(folder / "metrics.jsonl", self.logged),
            "samples.jsonl": _lines_until(folder / "samples.jsonl", iteration),
        }
        self._rows: list[dict[str, float]] = [json.loads(line) for line in kept["metrics.jsonl"]]
        state = state or {
            "tokens": self._rows[-1].get("num_tokens", 0) if self._rows else 0,
            "evaluations": [(r["iteration"], r["eval/accuracy"]) for r in self._rows if "eval/accuracy" in r],
            "runs": {},
        }
        self._tokens = int(state["tokens"])
        self._summary: dict[str, float] = state.get("summary", {})
        """The summary of the updates of the iteration that has no row yet."""
        self._evaluations: list[tuple[int, float]] = [(int(i), accuracy) for i, accuracy in state["evaluations"]]
        self._runs: dict[str, str] = dict(state["runs"])
        self._files: dict[str, TextIO] = {}
        self._services: dict[str, Service] = {}
        if main:
            self._services = start(folder, config, self.logged, self._runs)
            self._runs |= {name: service.run for name, service in self._services.items() if service.run}
            for name, lines in kept.items():
                _replace(folder / name, "".join(line + "\n" for line in lines))
                self._files[name] = open(folder / name, "a", encoding="utf-8")
            _cut(folder / ROLLOUTS, iteration)
            if config.tracking.rollouts:
                self._files[ROLLOUTS] = open(folder / ROLLOUTS, "a", encoding="utf-8")
            _keep_errors_until(folder / "reward_errors.txt", iteration)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        for service in self._services.values():
            service.close(failed=error is not None)

    def state(self) -> dict[str, Any]:
        """The state of the tracker, for a checkpoint. It can be written as JSON."""
        return {
            "logged": self.logged,
            "tokens": self._tokens,
            "evaluations": list(self._evaluations),
            "runs": dict(self._runs),
            "summary": self._summary | self._summarize(),
        }

    def update(self, prefix: str, update: dict[str, Any]) -> None:
        """Store the result of one update until the next `log`.

        `prefix` is `reval` for an update on a fresh batch and `reval/replay` for an update on a replayed batch.
        """
        self._updates.setdefault(prefix, []).append(update)

    def evaluated(self, iteration: int, evaluation: Evaluation | None) -> dict[str, float]:
        """Return the metrics of the evaluation, and store its accuracy for the plot.

        The metrics of iteration 0 (before training) are sent to the services here, because `log` is never called for
        iteration 0.
        """
        if evaluation is None:
            return {}
        metrics = evaluation.metrics()
        self._evaluations.append((iteration, metrics["eval/accuracy"]))
        if iteration == 0:
            self._send(0, metrics, [])
        return metrics

    def samples(self, iteration: int, rows: list[tuple[Any, str, float | None]]) -> None:
        """Save the first `tracking.samples` rows (prompt, completion, score) of the iteration."""
        self._samples = [
            {"iteration": iteration, "prompt": prompt, "completion": completion, "score": score}
            for prompt, completion, score in rows[: self._config.tracking.samples]
        ]
        self._write("samples.jsonl", self._samples)

    def rollouts(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows (rollout_log.py) of an iteration to rollouts.jsonl."""
        self._write(ROLLOUTS, rows)

    def reward_error(self, iteration: int, error: str) -> None:
        """Append the text `error`, an exception of the reward function, to reward_errors.txt."""
        if self._main:
            with open(self._folder / "reward_errors.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"iteration {iteration}\n{textwrap.indent(error, '  ')}\n\n")

    def log(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Write one iteration: `metrics`, and the means over the results of its updates. Returns the whole row."""
        row = {"iteration": iteration, **metrics, **self._summary, **self._summarize()}
        if "num_tokens" in metrics:  # not with rollout.engine=none
            self._tokens += int(metrics["num_tokens"])
            seconds = metrics.get("time/rollout", 0.0)
            row["rollout/tokens_per_second"] = metrics["num_tokens"] / seconds if seconds else 0.0
            row["num_tokens"] = self._tokens
        self._write("metrics.jsonl", [row])
        self._rows.append(row)
        self._send(iteration, row, self._samples)
        self._updates, self._samples, self._summary, self.logged = {}, [], {}, iteration
        return row

    def plot(self) -> None:
        """Draw curves.png from the logged rows. A failure is a warning, because a picture must not end a run."""
        if self._rows and self._main:
            try:
                from ..plots import save_curves

                save_curves(self._folder / "curves.png", self._rows, self._evaluations)
            except Exception as error:  # many types: no matplotlib, a bad font or matplotlibrc, a full disk
                text = f"curves.png could not be drawn ({type(error).__name__}: {error}); metrics.jsonl has the numbers"
                warnings.warn(text, stacklevel=2)

    def _summarize(self) -> dict[str, float]:
        """The metrics of the updates since the last `log`."""
        out = _summary(self._updates)
        if self._config.objective.name == "reval" and "reval" in self._updates:
            residual = torch.cat([u["residual_terms"]["residual"] for u in self._updates["reval"]])
            out["reval/value_lag"] = value_lag(residual)
        return out

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._main:
            self._files[name].writelines(json.dumps(row) + "\n" for row in rows)
            self._files[name].flush()

    def _send(self, iteration: int, row: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Log to every service. A service that fails is removed with a warning, because the training should go on."""
        for name, service in list(self._services.items()):
            try:
                service.log(iteration, row, samples)
            except Exception as error:
                del self._services[name]
                warnings.warn(
                    f"tracking.{name} failed in iteration {iteration} ({type(error).__name__}: {error}); this "
                    "service gets no more metrics, metrics.jsonl is still written",
                    stacklevel=3,
                )


def _lines_until(path: Path, iteration: int) -> list[str]:
    """The lines of a JSONL file with an `iteration` up to the given one.

    The lines are sorted by iteration, so reading stops at the first later iteration. It also stops at a line that is
    not JSON: kill -9 may leave an incomplete line.
    """
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


def _cut(path: Path, iteration: int) -> None:
    """Remove the lines of later iterations, and an incomplete last line, from a JSONL file that may not fit in memory.
    The lines are sorted by iteration."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = 0
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] > iteration:
                break
            end += len(line)
        file.truncate(end)


def _keep_errors_until(path: Path, iteration: int) -> None:
    """Remove the entries of later iterations from reward_errors.txt. An entry starts with the line `iteration N`."""
    if path.exists():
        text = path.read_text(encoding="utf-8", errors="replace")
        beyond = [m.start() for m in re.finditer(r"^iteration (\d+)$", text, re.M) if int(m[1]) > iteration]
        kept = text[: beyond[0]] if beyond else text
        _replace(path, kept[: kept.rfind("\n\n") + 2])  # removes an incomplete last entry, which has no empty line


def _replace(path: Path, text: str) -> None:
    """Replace the file in one step. So the file is complete, old or new, even if the run is killed while it resumes."""
    unfinished = path.with_name(f".{path.name}-unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _summary(updates: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Means over the updates with the same prefix: loss, grad_norm, lr, skipped, and the terms of the residuals.

    loss, grad_norm, lr and skipped (the fraction of updates without a step) are means over updates; the terms of the
    residuals are means over all trajectories.
    """
    out: dict[str, float] = {}
    for prefix, done in updates.items():
        top = "" if prefix == "reval" else "replay/"
        for key in ("loss", "grad_norm", "lr", "skipped"):
            out[top + key] = sum(u[key] for u in done) / len(done)
        terms = {key: torch.cat([u["residual_terms"][key] for u in done]) for key in done[0]["residual_terms"]}
        residual = terms.pop("residual")
        out[f"{prefix}/residual_mean"] = residual.mean().item()
        out[f"{prefix}/residual_abs"] = residual.abs().mean().item()
        out[f"{prefix}/residual_p95"] = residual.abs().quantile(0.95).item()
        out |= {f"{prefix}/{key}": x.mean().item() for key, x in terms.items()}
    return out
