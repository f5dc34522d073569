"""Reads the rows of a data set as dictionaries: from a file, the Hugging Face hub or a reasoning_gym generator.

Parquet files and the hub need the extra `data` (pip install 'reval-kernels[data]').
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import functools
import importlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import Config, ConfigError
from .environments import resolve as resolve_environment
from .model.shapes import check_random

Row = dict[str, Any]


def check_files(config: Config, training: bool = False) -> None:
    """Raise ConfigError if a file, or the module of a user's function, that the settings name does not exist.

    Args:
        training: also check replay.preload and objective.name, which an evaluation does not read.
    """
    benchmarks = [name for name in config.evaluation.benchmarks if Path(name).suffix]
    functions = {"reward.function": config.reward.function}
    functions |= {"evaluation.reward": config.evaluation.reward} if config.evaluation.benchmarks else {}
    functions |= {"objective.name": config.objective.name} if training else {}
    files = [
        ("data.path", config.data.path),
        ("data.held_out_path", config.data.held_out_path),
        *(("evaluation.benchmarks", name) for name in benchmarks),
        *((name, spec.rpartition(":")[0]) for name, spec in functions.items() if ".py:" in spec),
        ("replay.preload", config.replay.preload if training else None),
    ]
    for name, path in files:
        if path is not None:
            try:
                _existing(path)
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None
    try:
        check_random(config.model.name)
    except ValueError as error:
        raise ConfigError(f"model.name: {error}") from None
    if config.model.name.startswith(("/", ".")) and not Path(config.model.name).exists():
        raise ConfigError(f"model.name: there is no folder {config.model.name!r}")
    for name, spec in functions.items():
        module = spec.rpartition(":")[0]
        if module and ".py:" not in spec and not _found(module):
            raise ConfigError(f"{name}: there is no module {module!r}, of {spec!r}")


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or the name is not one of a module
        return False


def read_file(path: str | Path) -> Iterator[Row]:
    """The rows of a parquet file (if the name ends in .parquet) or of a JSONL file (any other name)."""
    return read_parquet(path) if Path(path).suffix == ".parquet" else read_jsonl(path)


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """The rows of a JSONL file: one JSON object per line, in UTF-8. Empty lines are skipped.

    Only a line feed ends a line: U+2028 within a text is a character of this text. A byte order mark is skipped.

    Raises ValueError, with the line number, for a line that is not a JSON object or that holds a lone surrogate, which
    no tokenizer can encode; ValueError for a missing file.
    """
    with open(_existing(path), "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text)
                if b"\\u" in line:
                    json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate cannot be encoded
            except UnicodeError as error:
                raise ValueError(f"{path}, line {number}: not Unicode text: {error}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object but {text.strip()[:80]!r}")
            yield row


def read_parquet(path: str | Path) -> Iterator[Row]:
    """The rows of a parquet file. Nested columns become dictionaries and lists."""
    parquet, file = _extra("pyarrow.parquet", f"reading {path}"), _existing(path)
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (ValueError, OSError) as error:  # pyarrow's errors do not name the file
        raise ValueError(f"{path}: not a parquet file that can be read: {error}") from None


def read_hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    """The rows of a data set on the Hugging Face hub, or of a folder that `datasets.load_dataset` takes.

    Raises ValueError, with the error message of `datasets`, if the data set cannot be loaded.
    """
    datasets = _extra("datasets", f"loading the data set {name!r}")
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # many types: no network, no such data set, no access rights, a broken data set
        where = f"{name!r}" + ("" if subset is None else f", subset {subset!r}") + f", split {split!r}"
        raise ValueError(f"the data set {where} cannot be loaded: {type(error).__name__}: {error}") from error
    yield from loaded


def read_reasoning_gym(name: str, options: dict[str, Any], size: int, seed: int) -> list[Row]:
    """The entries of a reasoning_gym generator. The same arguments give the same entries in every process.

    Some generators iterate over sets of text, whose order follows the hash seed of the process. Others draw from the
    global random generator. So the entries are made in a new process in which both are fixed.

    Raises ValueError for settings that reasoning_gym refuses, and if the new process dies.
    """
    return pickle.loads(_generated(name, pickle.dumps(options), size, seed))


def read_environment(spec: str, options: dict[str, Any], size: int, seed: int) -> list[Row]:
    """The rows of `problems(size, seed, **options)` of the environment that `spec` names. It runs in a new process.

    Raises ValueError if the environment makes no problems, or refuses the options.
    """
    with _hash_seed("0"), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_environment_problems, spec, options, size, seed).result()
        except BrokenProcessPool:
            raise ValueError(f"the process that makes the problems of environment.name={spec!r} died") from None


def _environment_problems(spec: str, options: dict[str, Any], size: int, seed: int) -> list[Row]:
    """Runs in the new process."""
    with contextlib.redirect_stdout(sys.stderr):
        make = getattr(resolve_environment(spec), "problems", None)
        if make is None:
            raise ValueError(
                f"data.source=environment needs an environment with problems(count, seed); {spec!r} has none"
            )
        random.seed(seed)
        try:
            rows = list(make(size, seed, **options))
        except Exception as error:  # code of the user may raise anything
            text = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"problems of environment.name={spec!r} failed with data.options={options}: {text}"
            ) from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"problems of environment.name={spec!r} must return dictionaries")
    return rows


@functools.lru_cache(maxsize=4)  # the new process imports reasoning_gym, which takes a second or more
def _generated(name: str, options: bytes, size: int, seed: int) -> bytes:
    with _hash_seed("0"), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_generate, name, options, size, seed).result()
        except BrokenProcessPool:
            raise ValueError(
                f"the process that makes the problems of data.name={name!r} died; its output is on stderr. A script "
                'that trains must do so under `if __name__ == "__main__":`, since new processes import it'
            ) from None


@contextlib.contextmanager
def _hash_seed(value: str) -> Iterator[None]:
    """Processes that start within the block hash text with this seed."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = value
    try:
        yield
    finally:
        del os.environ["PYTHONHASHSEED"]
        os.environ.update({} if before is None else {"PYTHONHASHSEED": before})


def _generate(name: str, options: bytes, size: int, seed: int) -> bytes:
    """Runs in the new process. Output of the generator goes to stderr, so that it does not mix with the trainer's."""
    import reasoning_gym

    random.seed(seed)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **pickle.loads(options))
            return pickle.dumps([dict(entry) for entry in dataset])
        except Exception as error:  # each generator has errors of its own
            text = f"{type(error).__name__}: {error}"
            raise ValueError(f"reasoning_gym refuses data.name={name!r} with data.options: {text}") from None


def pick(row: Row, columns: dict[str, str]) -> Row:
    """A copy of the row with further columns: `columns` maps a new name to a dotted path into the row.

    Example: {"answer": "reward_model.ground_truth"} adds row["reward_model"]["ground_truth"] as `answer`. Raises
    ValueError if the row has no such path.
    """
    out = dict(row)
    for name, path in columns.items():
        value: Any = row
        for part in [path] if path in row else path.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"data.columns: there is no column {path!r} for {name!r}, only {', '.join(row)}")
            value = value[part]
        out[name] = value
    return out


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        folder = Path(path).parent
        near = difflib.get_close_matches(Path(path).name, os.listdir(folder) if folder.is_dir() else [], n=1)
        raise ValueError(f"there is no file {str(path)!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return Path(path)


def _extra(module: str, why: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ValueError(
            f"{why} needs the package {package}, of the extra `data`: pip install 'reval-kernels[data]'"
        ) from None
