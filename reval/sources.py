"""Reads the rows of a data set as dictionaries, from a JSONL file, a parquet file or the Hugging Face hub.

Parquet files and the hub need the extra `data` (pip install 'reval[data]').
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]


def read_file(path: str | Path) -> Iterator[Row]:
    """The rows of a parquet file (if the name ends in .parquet) or of a JSONL file (any other name)."""
    return read_parquet(path) if Path(path).suffix == ".parquet" else read_jsonl(path)


def read_jsonl(path: str | Path) -> Iterator[Row]:
    """The rows of a JSONL file: one JSON object per line. Empty lines are skipped.

    Raises ValueError, with the line number, for a line that is not a JSON object; ValueError for a missing file.
    """
    with open(_existing(path), encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object but {line.strip()[:80]!r}")
            yield row


def read_parquet(path: str | Path) -> Iterator[Row]:
    """The rows of a parquet file. Nested columns become dictionaries and lists."""
    parquet = _extra("pyarrow.parquet", f"reading {path}")
    with parquet.ParquetFile(_existing(path)) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


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
        raise ValueError(f"there is no file {str(path)!r}")
    return Path(path)


def _extra(module: str, why: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise ValueError(f"{why} needs the package {package}, of the extra `data`: pip install 'reval[data]'") from None
