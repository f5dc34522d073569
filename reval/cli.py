"""The `reval` command: train, evaluate, env.

torch and everything that needs it are imported inside the functions that use them, so that `--help`, `--dry-run` and
a wrong setting answer at once, on any machine.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from reval import __version__
from reval.config import Config, ConfigError, help_text, load_config
from reval.config_io import is_override
from reval.errors import RunError

USAGE = """\
usage: reval train CONFIG.yaml [MORE.yaml ...] [section.setting=value ...] [--dry-run]
       reval evaluate CHECKPOINT [CONFIG.yaml ...] [section.setting=value ...] [--dry-run]
       reval env

  train      train a model; `python -m reval.train` is the same
  evaluate   answer the held-out problems with a checkpoint, given as its folder or its run's
  env        versions, backends and devices: what a bug report needs

  --help, -h   this text; after train or evaluate, every setting too
  --dry-run    print the resolved settings as YAML, and stop
  --version    print the version

Later files win over earlier ones, and section.setting=value over files. Values are YAML: optim.betas='[0.9, 0.99]',
replay.batch_size=null, data.options.max_digits=2."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit status."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    name = f"reval {command}" if command in COMMANDS else "reval"
    try:
        if command in COMMANDS:
            return COMMANDS[command](arguments)
        if command in ("--help", "-h"):
            print(USAGE)
        elif command == "--version":
            print(f"reval {__version__}")
        else:
            given = f"no command {command!r}; there are" if command else "give a command:"
            raise ConfigError(f"{given} {', '.join(COMMANDS)} (reval --help)")
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _train(arguments: list[str]) -> int:
    flags, files, overrides = _sort(arguments)
    if "--help" in flags:
        return _print_settings()
    if not arguments:
        raise ConfigError("name a config file, such as configs/demo.yaml (--help lists every setting)")
    config = load_config(files, overrides)
    if "--dry-run" in flags:
        return _print_config(config)
    from reval.loop import train

    train(config)
    return 0


def _evaluate(arguments: list[str]) -> int:
    flags, files, overrides = _sort(arguments)
    if "--help" in flags:
        return _print_settings()
    if not files:
        raise ConfigError("name a run folder or a checkpoint (reval --help)")
    checkpoint = Path(files[0])
    if not checkpoint.is_dir():
        raise ConfigError(f"CHECKPOINT must be a folder, a run's or a checkpoint's; '{checkpoint}' is not one")
    # The run's own settings come first, so that files and overrides only need to say what differs.
    own = [folder / "config.yaml" for folder in (checkpoint, checkpoint.resolve().parent)]
    config = load_config([*[path for path in own if path.is_file()][:1], *files[1:]], overrides)
    if "--dry-run" in flags:
        return _print_config(config)
    from reval.evaluate import main as evaluate

    evaluate(config, checkpoint)
    return 0


def _env(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("--help", "-h"):
        print(USAGE)
        return 0
    if arguments:
        raise ConfigError(f"env takes no arguments; got {' '.join(arguments)}")
    for name, value in _environment():
        print(f"{name:<14} {value}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {"train": _train, "evaluate": _evaluate, "env": _env}


def _sort(arguments: list[str]) -> tuple[set[str], list[str], list[str]]:
    """Split into flags, files and overrides, each in the order given."""
    flags = {"--help" if a == "-h" else a for a in arguments if a.startswith("-")}
    for flag in sorted(flags - {"--help", "--dry-run"}):
        raise ConfigError(f"unknown flag {flag}; there are --help and --dry-run; settings are section.setting=value")
    rest = [a for a in arguments if not a.startswith("-")]
    return flags, [a for a in rest if not is_override(a)], [a for a in rest if is_override(a)]


def _print_settings() -> int:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(f"{USAGE}\n\nSettings, with their defaults:\n\n{help_text(width)}")
    return 0


def _print_config(config: Config) -> int:
    print(config.to_yaml(), end="")
    return 0


def _environment() -> Iterator[tuple[str, str]]:
    yield "reval", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in ("torch", "transformers", "triton"):
        yield package, _version(package)
    yield "CPU", _cpu_name()
    try:
        import torch
    except ImportError:
        yield "threads", str(os.cpu_count())
        return  # no torch, so neither a GPU nor a backend
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for gpu in gpus:
        yield "GPU", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if not gpus:
        yield "GPU", "Apple (mps)" if torch.backends.mps.is_available() else "none"
    try:
        import reval_kernels
    except ImportError as error:
        yield "backends", f"reval_kernels cannot be imported: {error}"
        return
    for name, backend in reval_kernels.backends().items():
        default = f", default for {', '.join(backend.default_for)}" if backend.default_for else ""
        yield f"  {name}", f"available{default}" if backend.available else f"not available: {backend.reason}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or "x86_64" on Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
