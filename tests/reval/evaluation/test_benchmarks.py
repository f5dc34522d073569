"""Rows with the columns that each benchmark has on the hub become prompts and answers."""

from __future__ import annotations

import json

import pytest

from reval import config
from reval.evaluation import benchmarks
from reval.evaluation.benchmarks import BENCHMARKS, GPQA_COLUMNS, load_benchmark
from reval.rewards.verifiers import score_math

ROWS = {
    "aime24": {"id": 60, "problem": "P", "solution": "long", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"problem": "P", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "P", "answer": 27.0, "url": "u"},
    "math500": {"problem": "P", "solution": "s", "answer": r"\frac{1}{2}", "subject": "A", "level": 2},
    "minerva": {"question": "P", "answer": "4.5e33"},
    "olympiadbench": {"question": "P", "final_answer": ["1", "2"], "is_multiple_answer": True},
    "gpqa": dict(zip(GPQA_COLUMNS, ("P", "right", "w1", "w2", "w3"), strict=True)),
}


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(name, subset, split):
        raise ValueError(f"the data set {name!r} cannot be loaded: ConnectionError: offline")

    monkeypatch.setattr(benchmarks, "read_hub", refuse)


def write(folder, name, *rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_name_in_the_settings_can_be_loaded():
    assert config.BENCHMARKS == (*BENCHMARKS, "champ")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_local_file_with_the_hub_s_columns(name, tmp_path, no_hub):
    write(tmp_path, name, ROWS[name])
    found, [row] = load_benchmark(name, tmp_path)
    expected = {"olympiadbench": "1, 2", "amc23": "27.0"}.get(name, ROWS[name].get("answer"))
    assert found == name
    if name != "gpqa":
        assert row == {"prompt": "P", "answer": expected}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_is_asked_for_what_the_loader_says(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(benchmarks, "read_hub", lambda *where: asked.append(where) or iter([ROWS[name]]))
    load_benchmark(name, tmp_path)
    own = BENCHMARKS[name]
    assert asked == [(own.hub, own.subset, own.split)]


def test_gpqa_letters_point_at_the_right_choice_and_do_not_depend_on_the_file(tmp_path, no_hub):
    rows = [ROWS["gpqa"] | {"Question": f"Q{i}"} for i in range(60)]
    write(tmp_path, "gpqa", *rows)
    _, first = load_benchmark("gpqa", tmp_path)
    assert {row["answer"] for row in first} == set("ABCD")
    for row in first:
        assert f"({row['answer']}) right" in row["prompt"].splitlines()
        assert sorted(line[4:] for line in row["prompt"].splitlines() if line[:1] == "(") == ["right", "w1", "w2", "w3"]
    write(tmp_path, "gpqa", *reversed(rows))
    assert load_benchmark("gpqa", tmp_path)[1] == first[::-1]


def test_gpqa_is_scored_by_its_letter(tmp_path, no_hub):
    write(tmp_path, "gpqa", *(ROWS["gpqa"] | {"Question": f"Q{i}"} for i in range(8)))
    _, rows = load_benchmark("gpqa", tmp_path)
    forms = (
        "{}",
        "({})",
        "Answer: {}",
        "**{}**",
        "The final answer is {}.",
        r"\boxed{{{}}}",
        "{}. right",
        "Hm.\n\n({})",
    )
    for row in rows:
        others = [letter for letter in "ABCD" if letter != row["answer"]]
        for form in forms:
            texts = [form.format(letter) for letter in (row["answer"], *others)]
            assert score_math([""] * 4, texts, [[1]] * 4, answer=[row["answer"]] * 4) == [1.0, 0.0, 0.0, 0.0], texts
        hedged = [f"{row['answer']} or {others[0]}", "A, B, C, D", "(A) or (B)", row["answer"].lower(), ""]
        assert score_math([""] * 5, hedged, [[1]] * 5, answer=[row["answer"]] * 5) == [0.0] * 5


def test_a_local_file_may_simply_have_prompt_and_answer(tmp_path, no_hub):
    write(tmp_path, "aime24", {"prompt": "P", "answer": "1", "id": 7})
    assert load_benchmark("aime24", tmp_path) == ("aime24", [{"prompt": "P", "answer": "1", "id": 7}])


def test_a_file_of_your_own(tmp_path, no_hub):
    write(tmp_path, "mine", {"prompt": "P", "answer": "1"})
    assert load_benchmark(str(tmp_path / "mine.jsonl"), "nowhere") == ("mine", [{"prompt": "P", "answer": "1"}])


def test_without_hub_or_file_the_message_says_what_to_put_where(tmp_path, no_hub):
    with pytest.raises(ValueError) as caught:
        load_benchmark("olympiadbench", tmp_path)
    text = str(caught.value)
    assert "ConnectionError: offline" in text and str(tmp_path / "olympiadbench.jsonl") in text
    assert "question, final_answer of math-ai/olympiadbench, split test, or with `prompt` and `answer`" in text


def test_wrong_columns_are_named(tmp_path, no_hub):
    write(tmp_path, "aime24", ROWS["aime24"], {"question": "P"})
    with pytest.raises(ValueError, match="row 2: needs the columns problem, answer, or `prompt` and `answer`; it has"):
        load_benchmark("aime24", tmp_path)


def test_champ_keeps_the_problems_with_a_number(tmp_path, monkeypatch):
    package = tmp_path / "champ_dataset"
    (package / "dataset_files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('never imported')")
    answers = {"a": "239", "b": "4^n", "c": "-1/2", "d": "No such values", "e": "0 (i.e., none)"}
    problems = {name: {"_text": f"P{name}", "_answer": answer} for name, answer in answers.items()}
    (package / "dataset_files" / "v0.json").write_text(json.dumps({"problems": problems}))
    monkeypatch.syspath_prepend(tmp_path)
    rows = load_benchmark("champ", "nowhere")[1]
    assert rows == [{"prompt": "Pa", "answer": "239"}, {"prompt": "Pc", "answer": "-1/2"}]


def test_champ_without_its_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps champ-dataset"):
        load_benchmark("champ", "nowhere")
