"""Services that record metrics in addition to the files of the run: TensorBoard, Weights & Biases, trackio.

The package of a service is imported only if its setting is true. A resumed run continues its earlier run in the
service. Suppose the checkpoint is of iteration 5 and the process was killed after iteration 7: wandb and trackio then
hold iterations 6 and 7 twice, from the killed and from the resumed process, and TensorBoard hides the first ones. The
files of the run hold each iteration once.
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
    """A service that records a run."""

    run: str | None
    """Identifier of the run in the service, for resuming. None if the service needs no identifier."""

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        """Record the metrics of an iteration, and samples: dictionaries with the keys COLUMNS."""
        ...

    def close(self, failed: bool) -> None:
        """Send all waiting metrics and end the run. `failed`: the training ended with an exception."""
        ...


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir`."""

    run: str | None = None

    def __init__(self, folder: Path, config: Config, iteration: int, run: str | None):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides earlier events with step >= purge_step: they come from the process that was killed.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1 if iteration else None)

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, iteration)

    def close(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. Its environment variables work as usual, for example WANDB_MODE=offline."""

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
        # The x axis is `iteration` instead of wandb's own step. wandb's step never decreases, but the iteration of a
        # resumed run goes back to that of the checkpoint.
        self._run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, row: Row, samples: list[Sample]) -> None:
        table = {"samples": self._table(columns=list(COLUMNS), data=_cells(samples))} if samples else {}
        self._run.log({**row, "iteration": iteration, **table})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """trackio. It writes to a local SQLite file, or to the Space TRACKIO_SPACE_ID or the server TRACKIO_SERVER_URL."""

    def __init__(self, folder: Path, config: Config, iteration: int, run: str | None):
        import trackio

        # trackio finds a run by its name when the run resumes, so the name must be unique.
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
        # All iterations use the same table name: trackio shows the latest table, with a slider over the steps.
        table = {"samples": self._module.Table(columns=list(COLUMNS), data=_cells(samples))} if samples else {}
        self._run.log({**row, **table}, step=iteration)

    def close(self, failed: bool) -> None:
        self._module.finish()


SERVICES: dict[str, Callable[[Path, Config, int, str | None], Service]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""Services by name. The name is both the setting in section `tracking` and the package to install."""


def check_installed(config: Config) -> None:
    """Raise ConfigError if the settings ask for a service whose package is not installed."""
    for name in SERVICES:
        if getattr(config.tracking, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.{name} is true, but the package {name} is not installed: pip install {name} (or "
                f"'reval-kernels[trackers]' for all of them), or set tracking.{name}=false"
            )


def start(folder: Path, config: Config, iteration: int, runs: dict[str, str]) -> dict[str, Service]:
    """Start the services that the settings ask for. `runs` maps a service's name to the run that it continues.

    Raises ConfigError if a service cannot start.
    """
    check_installed(config)
    started: dict[str, Service] = {}
    for name, service in SERVICES.items():
        if not getattr(config.tracking, name):
            continue
        try:
            started[name] = service(folder, config, iteration, runs.get(name))
        except Exception as error:  # many types: no network, no login, no disk space left
            for other in started.values():
                other.close(failed=True)
            hint = "; WANDB_MODE=offline records without a server" if name == "wandb" else ""
            raise ConfigError(f"tracking.{name}: it did not start: {type(error).__name__}: {error}{hint}") from error
    return started


def _cells(samples: list[Sample]) -> list[list[Any]]:
    """Samples as rows of a table. A prompt of chat messages becomes one text."""
    return [[_text(sample[name]) for name in COLUMNS] for sample in samples]


def _text(value: Any) -> Any:
    return "\n".join(f"{m['role']}: {m['content']}" for m in value) if isinstance(value, list) else value
