"""Where the metrics go beside the run's own files: TensorBoard, Weights & Biases, trackio.

Each is imported only when it is asked for. A resumed run goes on in the run that it had there. What the killed process
told that one after the checkpoint stays in it (TensorBoard hides it), and the iterations that are done again appear
beside it; the run's own files hold each iteration once.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..config import Config, ConfigError

Row = dict[str, float]
Sample = dict[str, Any]
COLUMNS = ("iteration", "prompt", "completion", "score")


class Service(Protocol):
    """One place that records a run."""

    run: str | None
    """What the service knows the run by, for resuming; None where it needs no name."""

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        """Record the metrics of an iteration, and samples with the keys `COLUMNS`."""
        ...

    def close(self, failed: bool) -> None:
        """Send what is still waiting."""
        ...


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir`."""

    run: str | None = None

    def __init__(self, folder: Path, config: Config, iteration: int, run: str | None):
        from torch.utils.tensorboard import SummaryWriter

        # Events from here on, of the process that was killed, are hidden.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1 if iteration else None)

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline and its other variables hold."""

    def __init__(self, folder: Path, config: Config, iteration: int, run: str | None):
        import wandb

        self.run: str | None = run or uuid.uuid4().hex[:8]
        self._table = wandb.Table
        self._run = wandb.init(
            project=config.tracking.project,
            name=config.tracking.name or folder.resolve().name,
            id=self.run,
            config=config.to_dict(),
            dir=str(folder),
            resume="allow" if run else None,
        )
        # Not wandb's own step: that one cannot go back to the checkpoint when a run is resumed.
        self._run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        table = {"samples": self._table(columns=list(COLUMNS), data=_cells(samples))} if samples else {}
        self._run.log({**row, "iteration": iteration, **table})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio: a local SQLite file, or the Space or server that TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names."""

    def __init__(self, folder: Path, config: Config, iteration: int, run: str | None):
        import trackio

        # A run is found again by its name, so no other run may have it.
        self.run: str | None = run or f"{config.tracking.name or folder.resolve().name}-{uuid.uuid4().hex[:6]}"
        self._module = trackio
        settings = {f"{section}.{key}": value for section, s in config.to_dict().items() for key, value in s.items()}
        self._run = trackio.init(
            project=config.tracking.project,
            name=self.run,
            config=settings,
            resume="allow" if run else "never",
            embed=False,
        )

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        # one table a name: trackio shows the latest, with a slider over the steps
        table = {"samples": self._module.Table(columns=list(COLUMNS), data=_cells(samples))} if samples else {}
        self._run.log({**row, **table}, step=iteration)

    def close(self, failed: bool) -> None:
        self._module.finish()


SERVICES: dict[str, Callable[[Path, Config, int, str | None], Service]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""By the name of the setting in section `tracking`, which is also the package's."""


def check_installed(config: Config) -> None:
    """Raise ConfigError where a service is asked for whose package is not there."""
    for name in SERVICES:
        if getattr(config.tracking, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} is true, but the package {name} is not installed: pip install {name} (or "
                f"'reval[trackers]' for all of them), or set tracking.{name}=false"
            )


def start(folder: Path, config: Config, iteration: int, runs: dict[str, str]) -> dict[str, Service]:
    """The services that are asked for, each continuing its run in `runs`. Raises ConfigError where one cannot start."""
    check_installed(config)
    started: dict[str, Service] = {}
    for name, service in SERVICES.items():
        if not getattr(config.tracking, name):
            continue
        try:
            started[name] = service(folder, config, iteration, runs.get(name))
        except Exception as error:  # whatever a service raises: no network, no login, no space left
            for other in started.values():
                other.close(failed=True)
            hint = "; WANDB_MODE=offline records without a server" if name == "wandb" else ""
            raise ConfigError(f"tracking.{name}: it did not start: {type(error).__name__}: {error}{hint}") from error
    return started


def _cells(samples: list[Sample]) -> list[list[Any]]:
    """Samples as rows of a table, chat messages as text."""
    return [[_text(sample[name]) for name in COLUMNS] for sample in samples]


def _text(value: Any) -> Any:
    return "\n".join(f"{m['role']}: {m['content']}" for m in value) if isinstance(value, list) else value
