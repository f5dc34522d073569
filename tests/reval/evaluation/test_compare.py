"""Comparisons with known differences, on files in the format that evaluations save."""

from __future__ import annotations

import json

import numpy as np
import pytest

from reval.errors import RunError
from reval.evaluation.answers import Answered, Evaluation
from reval.evaluation.compare import compare, find, paired, read


def save(path, sets, answer=None, **settings):
    """Write a file of answers. `sets` maps a benchmark to the scores of each problem."""
    answers = [
        Answered(f"{name} {i}", ["x"] * len(scores), scores, benchmark=name, answer=answer, settings=settings)
        for name, problems in sets.items()
        for i, scores in enumerate(problems)
    ]
    Evaluation(answers).save(path)
    return path


def scores(values, name="held-out"):
    return {(name, str(i), 0): value for i, value in enumerate(values)}


def test_files_are_read_back_as_the_means_of_problems(tmp_path):
    path = save(tmp_path / "a.jsonl", {None: [[1.0, 0.0], [None, 1.0, 1.0, 1.0]], "aime24": [[1.0]]})
    assert list(read(path).scores.items()) == [
        (("held-out", '"None 0"', 0), 0.5),
        (("held-out", '"None 1"', 0), 0.75),
        (("aime24", '"aime24 0"', 0), 1.0),
    ]


def test_equal_prompts_stay_two_problems(tmp_path):
    path = tmp_path / "a.jsonl"
    Evaluation([Answered("p", ["x"], [1.0]), Answered("p", ["x"], [0.0])]).save(path)
    assert list(read(path).scores.values()) == [1.0, 0.0]


def test_a_constant_difference_has_an_interval_of_no_width():
    a = np.random.default_rng(0).random(50)
    (row,) = paired(scores(a), scores(a + 0.1), resamples=200, seed=0)
    assert (row.problems, row.low, row.high) == (50, pytest.approx(0.1), pytest.approx(0.1))
    assert row.verdict() == "B is better"
    (row,) = paired(scores(a + 0.1), scores(a), resamples=200, seed=0)
    assert row.verdict() == "A is better"


def test_the_interval_is_the_normal_one_for_many_problems():
    rng = np.random.default_rng(1)
    a, noise = rng.random(400), rng.normal(0.02, 0.3, 400)
    (row,) = paired(scores(a), scores(a + noise), resamples=4000, seed=3)
    half = 1.96 * noise.std() / 20
    assert row.b - row.a == pytest.approx(noise.mean())
    assert row.low == pytest.approx(noise.mean() - half, abs=0.1 * half)
    assert row.high == pytest.approx(noise.mean() + half, abs=0.1 * half)
    assert row.verdict().startswith("no difference shown") == (row.low < 0 < row.high)


def test_the_mean_weighs_sets_not_problems():
    a = scores([0.0] * 10, "small") | scores([0.0] * 90, "large")
    b = scores([1.0] * 10, "small") | scores([0.0] * 90, "large")
    small, large, mean = paired(a, b, resamples=100, seed=0)
    assert [row.b for row in (small, large, mean)] == [1.0, 0.0, 0.5]
    assert (mean.name, mean.problems, mean.low, mean.high) == ("mean", 100, 0.5, 0.5)


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    rng = np.random.default_rng(0)
    a, b = scores(rng.random(30)), scores(rng.random(30))
    first, again, other = (paired(a, b, resamples=500, seed=seed) for seed in (5, 5, 6))
    assert first == again != other


def test_other_problems_are_refused():
    with pytest.raises(RunError, match="but 1 are only in A, 2 only in B and 1 in both"):
        paired(scores([0, 0]), scores([0]) | scores([1, 1], "aime24"), resamples=10, seed=0)


def test_what_a_folder_stands_for(tmp_path):
    with pytest.raises(RunError, match="holds no evaluation"):
        find(tmp_path)
    first = save(tmp_path / "evaluations" / "iteration-000000.jsonl", {None: [[1.0]]})
    last = save(tmp_path / "evaluations" / "iteration-000010.jsonl", {None: [[1.0]]})
    assert (find(tmp_path), find(first)) == (last, first)
    own = save(tmp_path / "checkpoint" / "evaluation.jsonl", {None: [[1.0]]})
    assert find(tmp_path) == find(tmp_path / "checkpoint") == own
    second = save(tmp_path / "checkpoint" / "evaluation-2.jsonl", {None: [[1.0, 0.0]]}, temperature=0.5)
    for folder in (tmp_path, tmp_path / "checkpoint"):
        with pytest.raises(RunError, match="holds 2 evaluations; name one of the files:") as error:
            find(folder)
        assert f"  {own} (samples=1)" in str(error.value)
        assert f"  {second} (samples=2, temperature=0.5)" in str(error.value)


def test_different_settings_are_refused_unless_asked_for(tmp_path):
    """One run was evaluated by `reval evaluate`, the other by its training. Their scores are means of other things."""
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    both = {"max_new_tokens": 8, "reward": "math"}
    save(paths[0], {None: [[1.0, 1.0, 0.0, 1.0]]}, temperature=0.05, **both)
    save(paths[1], {None: [[0.0]]}, temperature=1.0, **both)
    with pytest.raises(RunError, match=r"different settings: samples 4 and 1; temperature 0.05 and 1.0. Evaluate"):
        compare(*paths)
    lines = compare(*paths, different_settings=True).splitlines()
    assert lines[0] == f"A: {paths[0]} (samples=4, temperature=0.05, max_new_tokens=8, reward=math)"
    assert lines[1] == f"B: {paths[1]} (samples=1, temperature=1.0, max_new_tokens=8, reward=math)"
    save(paths[1], {None: [[0.0] * 4]}, temperature=0.05, **both)
    assert "A is better" in compare(*paths)
    for other in ({"reward": "number"}, {"max_new_tokens": 9}, {"anything": 1}):
        save(paths[1], {None: [[0.0] * 4]}, **{"temperature": 0.05} | both | other)
        with pytest.raises(RunError, match=f"different settings: {next(iter(other))}"):
            compare(*paths)
    save(paths[1], {None: [[0.0] * 4]})  # a file that an earlier version or another program wrote
    with pytest.raises(RunError, match="max_new_tokens 8 and unknown; reward math and unknown; temperature 0.05 and"):
        compare(*paths)


def test_other_right_answers_are_refused(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path, answer in zip(paths, ("12", "13"), strict=True):
        save(path, {None: [[1.0]]}, answer)
    with pytest.raises(RunError, match="""same right answers, but that of "None 0" is '12' in A and '13' in B"""):
        compare(*paths)
    save(paths[1], {None: [[1.0]]})  # written without the right answer
    assert "held-out" in compare(*paths)


@pytest.mark.parametrize("line", ["{", '{"prompt": "p"}', '{"prompt": "p", "scores": []}', "[1]"])
def test_a_broken_file_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "q", "scores": [1]}) + "\n" + line + "\n")
    with pytest.raises(RunError, match="a.jsonl, line 2: not an answered problem"):
        read(path)
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(RunError, match="a.jsonl, line 1: not an answered problem"):
        read(path)
    path.write_text("")
    with pytest.raises(RunError, match="holds no answers"):
        read(path)


def test_what_is_printed(tmp_path):
    a = save(tmp_path / "a.jsonl", {None: [[0.0, 0.0], [1.0, 0.0]], "aime24": [[0.0]]})
    b = save(tmp_path / "b.jsonl", {None: [[0.0, 0.0], [1.0, 1.0]], "aime24": [[1.0]]})
    lines = compare(a, b, resamples=1000, seed=2).splitlines()
    assert lines[:2] == [f"A: {a} (samples=2 or 1)", f"B: {b} (samples=2 or 1)"]
    assert lines[3].split() == ["held-out", "2", "25.0", "50.0", "+25.0", "[+0.0,", "+50.0]"]
    assert lines[4].split() == ["aime24", "1", "0.0", "100.0", "+100.0", "[+100.0,", "+100.0]"]
    assert lines[-2] == "mean: B is better." and "(1000 resamples, seed 2)" in lines[-1]
