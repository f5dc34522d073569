r"""Benchmarks as rows with `prompt` and `answer`: those of docs/method.md section 5, and champ, which needs no network.

A benchmark is read from the file <evaluation.folder>/<name>.jsonl or .parquet. If there is no such file, it is read
from the Hugging Face hub. A local file has either the columns of the data set on the hub, or `prompt` and `answer`.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..sources import Row, read_file, read_hub


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """The data set of a benchmark on the hub, and the conversion of a row to a prompt and an answer."""

    hub: str
    subset: str | None = None
    split: str = "test"
    columns: tuple[str, ...]
    """The columns that `convert` reads."""
    convert: Callable[[Row], tuple[str, str]]
    """Returns (problem, answer) of a row."""
    size: int
    """Number of problems."""


def _plain(hub: str, question: str, size: int, split: str = "test") -> Benchmark:
    def convert(row: Row) -> tuple[str, str]:
        return str(row[question]), str(row["answer"])

    return Benchmark(hub=hub, split=split, columns=(question, "answer"), convert=convert, size=size)


def _olympiad(row: Row) -> tuple[str, str]:
    """A problem may have several answers. They become one text with commas: "2, 3"."""
    answers = row["final_answer"]
    return str(row["question"]), ", ".join(map(str, answers)) if isinstance(answers, list) else str(answers)


GPQA_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _gpqa(row: Row) -> tuple[str, str]:
    """Four choices with letters; the answer is a letter. The order of the choices depends only on the question."""
    question, *choices = (str(row[name]).strip() for name in GPQA_COLUMNS)
    order = random.Random(question).sample(range(4), 4)
    lines = [f"({letter}) {choices[i]}" for letter, i in zip("ABCD", order, strict=True)]
    text = "\n".join([question, "", *lines, "", "Answer with the letter of the right choice: A, B, C or D."])
    return text, "ABCD"[order.index(0)]


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": _plain("HuggingFaceH4/aime_2024", "problem", 30, split="train"),
    "aime25": _plain("math-ai/aime25", "problem", 30),
    "amc23": _plain("math-ai/amc23", "question", 40),
    "math500": _plain("HuggingFaceH4/MATH-500", "problem", 500),
    "minerva": _plain("math-ai/minervamath", "question", 272),
    "olympiadbench": Benchmark(
        hub="math-ai/olympiadbench", columns=("question", "final_answer"), convert=_olympiad, size=674
    ),
    "gpqa": Benchmark(
        hub="Idavidrein/gpqa", subset="gpqa_diamond", split="train", columns=GPQA_COLUMNS, convert=_gpqa, size=198
    ),
}
CHAMP_SIZE = 85


def load_benchmark(spec: str, folder: str | Path) -> tuple[str, list[Row]]:
    """Load a benchmark by its name, or your own JSONL or parquet file by its path.

    Returns the name and the rows: dictionaries with `prompt`, `answer` and, from your own file, all further columns.
    Raises ValueError if the benchmark is neither in `folder` nor available from the hub (the message says which file
    with which columns is needed), or if a row lacks a column.
    """
    if spec == "champ":
        return spec, _champ()
    if spec not in BENCHMARKS:
        return Path(spec).stem, list(read_file(spec))
    benchmark = BENCHMARKS[spec]
    local = [path for path in (Path(folder) / f"{spec}{end}" for end in (".jsonl", ".parquet")) if path.is_file()]
    if local:
        source, rows = str(local[0]), list(read_file(local[0]))
    else:
        source, rows = benchmark.hub, _from_hub(spec, benchmark, Path(folder))
    return spec, [_row(row, number, source, benchmark) for number, row in enumerate(rows, 1)]


def _from_hub(name: str, benchmark: Benchmark, folder: Path) -> list[Row]:
    try:
        return list(read_hub(benchmark.hub, benchmark.subset, benchmark.split))
    except ValueError as error:
        subset = f", subset {benchmark.subset}" if benchmark.subset else ""
        raise ValueError(
            f"benchmark {name!r}: {error}\nWithout the hub, put its rows into {folder / name}.jsonl (or .parquet; "
            f"evaluation.folder), one problem each, with the columns {', '.join(benchmark.columns)} of "
            f"{benchmark.hub}{subset}, split {benchmark.split}, or with `prompt` and `answer`"
        ) from error


def _row(row: Row, number: int, source: str, benchmark: Benchmark) -> Row:
    if "prompt" in row and "answer" in row:
        return row
    missing = [name for name in benchmark.columns if name not in row]
    if missing:
        raise ValueError(
            f"{source}, row {number}: needs the columns {', '.join(benchmark.columns)}, or `prompt` and `answer`; it "
            f"has {', '.join(row)}"
        )
    prompt, answer = benchmark.convert(row)
    return {"prompt": prompt, "answer": answer}


def _champ() -> list[Row]:
    """The problems of CHAMP (arXiv 2401.06961) whose answer is one number.

    Other answers, for example `4^n` or `No such values`, can only be compared by a human or a model. The problems are
    read from the files of the PyPI package champ-dataset, without importing the package.
    """
    spec = importlib.util.find_spec("champ_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "benchmark 'champ' comes from the PyPI package champ-dataset, which is not installed: "
            "pip install --no-deps champ-dataset==1.0.0"
        )
    path = Path(spec.submodule_search_locations[0]) / "dataset_files" / "v0.json"
    problems = json.loads(path.read_text(encoding="utf-8"))["problems"].values()
    number = re.compile(r"-?\d+(?:\.\d+)?(?:/\d+)?")
    return [{"prompt": p["_text"], "answer": p["_answer"]} for p in problems if number.fullmatch(p["_answer"])]
