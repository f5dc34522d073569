"""Rows from files and from `datasets`. Tests of parquet files and of the hub use the real packages if installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType

import pytest

import reval.sources
from reval.config import ConfigError, load_config
from reval.sources import check_files, pick, read_file, read_hub, read_jsonl, read_parquet, read_reasoning_gym

ROWS = [{"prompt": "1+1", "answer": "2", "deep": {"a": [1, 2]}}, {"prompt": "ü", "answer": None, "deep": {"a": []}}]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def test_jsonl(jsonl):
    assert list(read_jsonl(jsonl)) == list(read_file(jsonl)) == ROWS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{'a'", "line 2: not JSON"),
        (b"[1]", "line 2: not a JSON object"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"1" * 5000, "line 2: not JSON"),
        (b'{"a": "\xe9"}', "line 2: not Unicode text"),
        (b'{"a": ["\\ud83d"]}', "line 2: not Unicode text: .*surrogates not allowed"),
    ],
)
def test_broken_jsonl(jsonl, text, message):
    jsonl.write_bytes(b'{"a": 1}\n' + text + b"\n")
    with pytest.raises(ValueError, match=message):
        list(read_jsonl(jsonl))


def test_only_a_line_feed_ends_a_line_of_jsonl(jsonl):
    """U+2028, U+2029 and U+0085 end a line for str.splitlines, but not in JSONL. Windows writes a mark and CRLF."""
    text = '{"a": "1\u2028\u2029\x85\\ud83d\\ude00"}\r\n{"a": 2}\r\n'
    jsonl.write_bytes(text.encode("utf-8-sig"))
    assert list(read_jsonl(jsonl)) == [{"a": "1\u2028\u2029\x85\N{GRINNING FACE}"}, {"a": 2}]
    jsonl.write_bytes("\n".encode("utf-8-sig"))
    assert list(read_jsonl(jsonl)) == []


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_parquet(path)) == list(read_file(path)) == ROWS


def test_a_file_that_is_not_parquet_is_named(jsonl):
    pytest.importorskip("pyarrow", reason="the extra `data`")
    with pytest.raises(ValueError, match=r"rows.jsonl: not a parquet file"):
        list(read_parquet(jsonl))


@pytest.mark.parametrize("name", ["ransom_note", "list_functions"])
def test_a_generator_gives_the_same_problems_in_every_process(name):
    """The first iterates over a set of text. The second draws from the global random generator."""
    program = f"from reval.sources import *; print(read_reasoning_gym({name!r}, {{}}, 20, 0))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert other.stdout.strip() == str(read_reasoning_gym(name, {}, 20, 0))


def die(*arguments):
    os._exit(1)


def test_a_generator_whose_process_dies(monkeypatch):
    monkeypatch.setattr(reval.sources, "_generate", die)
    with pytest.raises(ValueError, match="data.name='died' died; .* `if __name__"):
        read_reasoning_gym("died", {}, 1, 0)


def test_hub_loads_what_datasets_loads(jsonl):
    pytest.importorskip("datasets", reason="the extra `data`")
    assert list(read_hub(str(jsonl.parent), None, "train")) == ROWS


def test_a_hub_that_cannot_be_reached_is_said_with_its_own_words(monkeypatch):
    fake = ModuleType("datasets")

    def load_dataset(name, subset, *, split):
        raise ConnectionError(f"no route to {name} {subset} {split}")

    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    message = "'a/b', subset 'c', split 'test' cannot be loaded: ConnectionError: no route to a/b c test"
    with pytest.raises(ValueError, match=message):
        list(read_hub("a/b", "c", "test"))


@pytest.mark.parametrize(
    ("module", "read"),
    [("pyarrow.parquet", lambda: read_parquet("x.parquet")), ("datasets", lambda: read_hub("a/b", None, "test"))],
)
def test_a_missing_extra_is_named(monkeypatch, module, read):
    package = module.partition(".")[0]
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    def refuse(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("reval.sources.importlib.import_module", refuse)
    with pytest.raises(ValueError, match=rf"needs the package {package}, .* pip install 'reval-kernels\[data\]'"):
        list(read())


def test_a_missing_file():
    with pytest.raises(ValueError, match="there is no file 'gone.jsonl'"):
        list(read_file("gone.jsonl"))


def test_columns_are_picked_from_where_they_lie():
    row = {"problem": "P", "reward_model": {"ground_truth": "4"}, "a.b": 1}
    picked = pick(row, {"prompt": "problem", "answer": "reward_model.ground_truth", "dotted": "a.b"})
    assert picked == row | {"prompt": "P", "answer": "4", "dotted": 1}
    assert "prompt" not in row
    with pytest.raises(ValueError, match="no column 'reward_model.gold' for 'answer', only problem, reward_model, a.b"):
        pick(row, {"answer": "reward_model.gold"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["data.source=jsonl", "data.path=HERE/row.jsonl"],
            "data.path: there is no file .*row.jsonl'; did you mean 'rows",
        ),
        (
            ["data.source=jsonl", "data.path=HERE/rows.jsonl", "data.held_out_path=h"],
            "data.held_out_path: .* no file 'h'",
        ),
        (["evaluation.benchmarks=[gone.jsonl]"], "evaluation.benchmarks: there is no file 'gone.jsonl'"),
        (["reward.function=HERE/my.py:score"], "reward.function: there is no file '.*my.py'"),
        (["evaluation.reward=my.py:score", "evaluation.benchmarks=[aime24]"], "evaluation.reward: .* no file 'my.py'"),
        (["objective.name=HERE/my.py:loss"], "objective.name: there is no file '.*my.py'"),
        (["objective.name=no.such:loss"], "objective.name: there is no module 'no.such', of 'no.such:loss'"),
        (["replay.preload=gone"], "replay.preload: there is no file 'gone'"),
        (["reward.function=no.such:score"], "reward.function: there is no module 'no.such', of 'no.such:score'"),
        (["model.name=./gone"], "model.name: there is no folder './gone'"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_loaded(jsonl, settings, message):
    config = load_config(overrides=[text.replace("HERE", str(jsonl.parent)) for text in settings])
    with pytest.raises(ConfigError, match=message):
        check_files(config, training=True)
    unused = ["evaluation.reward=my.py:score", "replay.preload=gone", "objective.name=my.py:loss"]
    check_files(load_config(overrides=unused))
