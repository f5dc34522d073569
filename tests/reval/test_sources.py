"""Rows from files and from `datasets`. Tests of parquet files and of the hub use the real packages if installed."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from reval.sources import pick, read_file, read_hub, read_jsonl, read_parquet

ROWS = [{"prompt": "1+1", "answer": "2", "deep": {"a": [1, 2]}}, {"prompt": "ü", "answer": None, "deep": {"a": []}}]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
    return path


def test_jsonl(jsonl):
    assert list(read_jsonl(jsonl)) == list(read_file(jsonl)) == ROWS


@pytest.mark.parametrize(("text", "message"), [("{'a'", "line 2: not JSON"), ("[1]", r"line 2: not a JSON object")])
def test_broken_jsonl(jsonl, text, message):
    jsonl.write_text('{"a": 1}\n' + text + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_jsonl(jsonl))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_parquet(path)) == list(read_file(path)) == ROWS


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
    with pytest.raises(ValueError, match=rf"needs the package {package}, .* pip install 'reval\[data\]'"):
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
