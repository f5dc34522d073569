"""The `reval` command: train, evaluate, compare, plot, env.

torch, and every module that imports torch, is imported inside the function that uses it. So `--help`, `--dry-run` and
the message about a wrong setting appear without delay and on machines without torch.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from reval import __version__
from reval.config import Config, ConfigError, help_text, load_config
from reval.config_io import dump_yaml, expand_home, is_override
from reval.errors import RunError
from reval.estimate import report
from reval.output import lenient_output, missing_output
from reval.sources import check_files

USAGE = """\
usage: reval train CONFIG.yaml [MORE.yaml ...] [section.setting=value ...] [--resume auto|PATH|false] [--dry-run]
       reval evaluate CHECKPOINT [CONFIG.yaml ...] [section.setting=value ...] [--out FILE] [--json] [--dry-run]
       reval compare RUN_A RUN_B [--different-settings] [--resamples 10000] [--seed 0]
       reval plot RUN [RUN ...] [--out curves.png] [--metrics eval/accuracy,reward] [--axis rollouts]
       reval env [--rates]

  train      train a model; `python -m reval.train` is the same
  evaluate   evaluate a checkpoint on the held-out problems and benchmarks; CHECKPOINT is the folder of a checkpoint
             or of a run; --out names the file for the answers (default: a file in the checkpoint); --json prints the
             metrics as one line of JSON
  compare    print the difference between two evaluations of the same problems, with a bootstrap interval; evaluations
             with different samples, temperature, length or reward need --different-settings
  plot       draw learning curves of several runs over rollouts, updates or iterations; runs that differ only in
             their seed become one curve, with mean and range; only --out replaces an existing file
  env        print versions, backends and devices, for a bug report; --rates also measures, in a few seconds, how fast
             the device copies, reads and multiplies (bf16 on a GPU, fp32 on a CPU)

  --help, -h   print this text; after train or evaluate, print every setting too
  --resume X   the same as run.resume=X: continue from the newest checkpoint (auto) or from the checkpoint X
  --dry-run    do not train: print the resolved settings as YAML and, as comments, the memory and tokens that
               training needs; --gpus N sets the number of GPUs (default: WORLD_SIZE, or 1)
  --version    print the version

A later file wins over an earlier file, and section.setting=value wins over files. Values are YAML:
optim.betas='[0.9, 0.99]', replay.batch_size=null, data.options.max_digits=2."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the arguments of this process) and return the exit status.

    0: success. 1: RunError, or standard output could not be written. 2: ConfigError. 130: interrupted by Ctrl-C. A
    reader that closes the pipe (`reval --help | head`) is no error, and training goes on without any output.
    """
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    with lenient_output():
        status = _run(command, arguments)
        trains = command == "train" and not {"--dry-run", "--help", "-h"} & set(arguments)
        if status == 0 and not trains and (missing := missing_output()):
            print(f"reval {command}: {missing}", file=sys.stderr)
            return 1
    return status


def _run(command: str, arguments: list[str]) -> int:
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
    flags, files, overrides = _sort(arguments, ("--resume", "--gpus"))
    if "--help" in flags:
        return _print_settings()
    if not arguments:
        raise ConfigError("name a config file, such as configs/demo.yaml (--help lists every setting)")
    if "--resume" in flags:
        overrides.append(f"run.resume={flags['--resume']}")
    if "--gpus" in flags and "--dry-run" not in flags:
        raise ConfigError("--gpus only goes with --dry-run; torchrun --nproc-per-node says how many GPUs train")
    gpus = _whole(flags, "--gpus", os.environ.get("WORLD_SIZE") or "1", 1)
    config = load_config(files, overrides)
    if "--dry-run" in flags:
        check_files(config, training=True)
        _print_config(config)
        print(report(config, gpus), end="")
        return 0
    _set_up()
    from reval.loop import train

    train(config)
    return 0


def _evaluate(arguments: list[str]) -> int:
    flags, files, overrides = _sort(arguments, ("--out", "--json"))
    if "--help" in flags:
        return _print_settings()
    if not files:
        raise ConfigError("name a run folder or a checkpoint (reval --help)")
    checkpoint = Path(files[0])
    if not checkpoint.is_dir():
        raise ConfigError(f"CHECKPOINT must be a folder, a run's or a checkpoint's; '{checkpoint}' is not one")
    # The settings of the run are loaded first. Files and overrides then only need the settings that differ.
    own = [folder / "config.yaml" for folder in (checkpoint, checkpoint.resolve().parent)]
    config = load_config([*[path for path in own if path.is_file()][:1], *files[1:]], overrides)
    if "--dry-run" in flags:
        check_files(config)
        return _print_config(config)
    _set_up()
    from reval.evaluation.answering import main as evaluate

    return evaluate(config, checkpoint, Path(flags["--out"]) if "--out" in flags else None, "--json" in flags)


def _compare(arguments: list[str]) -> int:
    flags, paths = _flags(arguments, ("--help", "--different-settings", "--resamples", "--seed"))
    if "--help" in flags:
        print(USAGE)
        return 0
    resamples, seed = _whole(flags, "--resamples", "10000", 1), _whole(flags, "--seed", "0", 0)
    if len(paths) != 2:
        raise ConfigError(f"name two runs, checkpoints or files of answers; got {len(paths)}")
    from reval.evaluation.compare import compare

    different = "--different-settings" in flags
    print(compare(*map(Path, paths), resamples=resamples, seed=seed, different_settings=different))
    return 0


def _plot(arguments: list[str]) -> int:
    flags, folders = _flags(arguments, ("--help", "--out", "--metrics", "--axis"))
    if "--help" in flags:
        print(USAGE)
        return 0
    if not folders:
        raise ConfigError("name one run folder or more")
    out, metrics = Path(flags.get("--out", "curves.png")), flags.get("--metrics", "eval/accuracy,reward").split(",")
    if "--out" not in flags and out.exists():  # it may be the picture of a run, or of other runs
        raise ConfigError(f"this folder already has a {out}; --out FILE.png names another file, or the one to replace")
    if not out.suffix:
        raise ConfigError(f"--out must end with the kind of picture, such as {out}.png")
    _set_up()
    from reval.curves import table
    from reval.plots import compare_runs

    print(table(compare_runs(out, folders, metrics, flags.get("--axis", "rollouts"))))
    print(f"drawn in {out}")
    return 0


def _env(arguments: list[str]) -> int:
    flags, rest = _flags(arguments, ("--help", "--rates"))
    if "--help" in flags:
        print(USAGE)
        return 0
    if rest:
        raise ConfigError(f"env takes no arguments; got {' '.join(rest)}")
    for name, value in _environment():
        print(f"{name:<14} {value}")
    if "--rates" in flags:
        for line in _rates():
            print(line, flush=True)
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "plot": _plot,
    "env": _env,
}
FLAG_VALUES = {
    "--resume": "auto, false or a checkpoint's folder",
    "--gpus": "N",
    "--resamples": "N",
    "--seed": "N",
    "--out": "FILE",
    "--metrics": "NAME,NAME",
    "--axis": "rollouts, updates or iterations",
}


def _sort(arguments: list[str], valued: tuple[str, ...] = ()) -> tuple[dict[str, str], list[str], list[str]]:
    """Split the arguments into flags, files and overrides, each in the order given."""
    flags, rest = _flags(arguments, ("--help", "--dry-run", *valued))
    return flags, [a for a in rest if not is_override(a)], [a for a in rest if is_override(a)]


def _flags(arguments: list[str], known: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into flags with their values, and all other arguments in order.

    A flag in FLAG_VALUES takes a value, as `--flag value` or `--flag=value`. Other flags have the value "". A leading
    `~`, which the shell leaves in `--flag=~/x`, becomes the home folder.
    """
    flags: dict[str, str] = {}
    rest = []
    left = iter(arguments)
    for argument in left:
        flag, equals, value = argument.partition("=")
        if flag in known and flag in FLAG_VALUES:
            flags[flag] = expand_home(value if equals else next(left, ""))
            if not flags[flag] or flags[flag].startswith("-"):
                raise ConfigError(f"{flag} needs a value: {flag} {FLAG_VALUES[flag]}")
        elif argument == "-h" or argument in known:
            flags["--help" if argument == "-h" else argument] = ""
        elif argument.startswith("-"):
            there = f"{', '.join(known[:-1])} and {known[-1]}"
            raise ConfigError(f"unknown flag {argument}; there are {there}; settings are section.setting=value")
        else:
            rest.append(expand_home(argument))
    return flags, rest


def _whole(flags: dict[str, str], flag: str, default: str, least: int) -> int:
    """The value of a flag as a whole number of at least `least`."""
    value = flags.get(flag, default)
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{flag} must be a whole number, at least {least}; got {value!r}")
    return int(value)


def _set_up() -> None:
    """Prepare this process, and the reward workers that it starts, for a command that imports other packages."""
    # A notebook sets MPLBACKEND for every command that is started from a cell. Where the backend that it names is not
    # installed, matplotlib cannot be imported, nor can reasoning_gym, which imports matplotlib.
    os.environ["MPLBACKEND"] = "agg"
    # `python -m reval.train` finds modules in the current folder, so the installed command does too. Example:
    # reward.function=my_rewards:shorter, where my_rewards is a module in this folder.
    with suppress(OSError):  # the current folder was deleted
        here = os.getcwd()
        if here not in sys.path and not sys.flags.safe_path:
            sys.path.insert(0, here)


def _print_settings() -> int:
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    print(f"{USAGE}\n\nSettings, with their defaults:\n\n{help_text(width)}")
    return 0


def _print_config(config: Config) -> int:
    text = config.to_yaml()
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = dump_yaml(config.to_dict(), ascii_only=True)  # still the same settings when it is read back
    print(text, end="")
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
        return  # without torch there is no list of GPUs and backends
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for gpu in gpus:
        kind = f"compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
        yield "GPU", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {kind}"
    if gpus:
        yield "GPU software", _gpu_software()
    else:
        yield "GPU", "Apple (mps)" if torch.backends.mps.is_available() else "none"
    try:
        import reval_kernels
    except ImportError as error:
        yield "backends", f"reval_kernels cannot be imported: {error}"
        return
    for name, backend in reval_kernels.backends().items():
        yield f"  {name}", _usable(backend, bool(gpus))


def _gpu_software() -> str:
    """The driver's version and the version of CUDA or ROCm that torch was built for."""
    import torch

    from reval.device import nvidia_smi

    driver = nvidia_smi("driver_version").get("driver_version", "unknown")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return f"driver {driver}, torch built for {built}"


def _rates() -> Iterator[str]:
    try:
        import torch
    except ImportError:
        raise RunError("--rates needs torch, which is not installed") from None
    from reval.device import rates

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"rates of {torch.cuda.get_device_name(device) if device.type == 'cuda' else _cpu_name()}"
    for rate in rates(device):
        yield f"  {rate.name:<20} {rate}"


def _usable(backend: Any, gpu: bool) -> str:
    """What a backend can do on this machine. Triton is found as installed with or without a GPU."""
    if not backend.available:
        return f"not available: {backend.reason}"
    if backend.default_for == ("cuda",) and not gpu:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "available for CPU tensors, very slowly: TRITON_INTERPRET=1 is set"
        return "installed, but needs a GPU (or TRITON_INTERPRET=1, to run CPU tensors very slowly)"
    devices = ["every other device" if device == "*" else device for device in backend.default_for]
    return f"available, default for {', '.join(devices)}" if devices else "available"


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
