"""The command `python -m benchmarks`, on the smallest shapes and with providers that need no compilation."""

import json

import pytest
import torch

from benchmarks.__main__ import Progress, main, tables

TRIAL = ["--quick", "--seconds", "0.01", "--no-memory", "--provider", "portable", "--provider", "torch eager"]


def test_a_quick_run_writes_data_page_and_plots(tmp_path, capsys):
    assert main([*TRIAL, "--output", str(tmp_path)]) == 0
    written = sorted(p.suffix for p in tmp_path.iterdir())
    assert written == [".json", ".md", ".png", ".png"]  # times and curves
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert {r["provider"] for r in rows if r["status"] == "timed"} == {"limit", "portable", "torch eager"}
    assert len({r["op"] for r in rows}) == 5 and {r["curve"] for r in rows} == {"", "N", "V"}
    assert "not measured" in capsys.readouterr().out  # the bars need larger shapes


@pytest.mark.parametrize(
    ("capability", "patient", "tokens"), [("AVX2", False, 64), ("AVX2", True, 1024), ("AVX512", False, 1024)]
)
def test_fewer_tokens_of_bf16_where_its_matmuls_are_slow(capability, patient, tokens, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    heads = [case for case in tables("cpu", quick=False, patient=patient) if case.shape.width]
    assert {case.shape.tokens for case in heads if case.dtype == torch.float32} == {1024}
    narrow = {case.shape.vocabulary: case.shape.tokens for case in heads if case.dtype == torch.bfloat16}
    assert narrow == {49_152: tokens, 151_936: 64 if capability == "AVX2" else 1024}


def test_only_takes_an_op_by_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--only", "no such op"])
    assert "bellman_loss forward+backward" in capsys.readouterr().err
    assert main([*TRIAL, "--only", "bellman_loss forward+backward", "--output", str(tmp_path)]) == 0
    assert {r["op"] for r in json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]} == {
        "bellman_loss forward+backward"
    }


@pytest.mark.parametrize("words", [["--runs", "0"], ["--seconds", "nan"], ["--seconds", "-1"], ["--device", "cuda"]])
def test_what_cannot_be_is_said_before_anything_is_timed(words, capsys):
    if words[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main([*TRIAL, *words])
    assert words[0] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main([*TRIAL, "--output", str(tmp_path / "file")])
    assert "--output: cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--runs", "1"], ["--no-curves"], []])
def test_neither_trials_nor_interrupted_runs_replace_a_full_one(words, tmp_path, monkeypatch):
    full, trial = tmp_path / "full", tmp_path / "trial"
    monkeypatch.setattr("benchmarks.__main__.FULL", full)
    monkeypatch.setattr("benchmarks.__main__.TRIAL", trial)
    monkeypatch.setattr("benchmarks.__main__.Suite.run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(words) == 130
    assert len(list(trial.iterdir())) == 2 and not list(full.glob("*"))


def test_ctrl_c_writes_what_was_measured(tmp_path, monkeypatch):
    from benchmarks.suite import Suite

    monkeypatch.setattr(Suite, "measure_memory", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main([*TRIAL, "--output", str(tmp_path)]) == 130
    data = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert data["interrupted"] == [True] and {r["op"] for r in data["rows"]} == {"token_values forward"}


def test_progress_says_how_far_and_how_long(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.__main__.time.monotonic", lambda: now[0])
    progress = Progress([1.0, 3.0])
    progress.begin("first")
    now[0] = 60.0
    progress.begin("second")
    assert capsys.readouterr().out.splitlines() == [
        "[ 0.0 min,   0%, estimating the time left] 1/2 first",
        "[ 1.0 min,  25%, about 3.0 min left] 2/2 second",
    ]
