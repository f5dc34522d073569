"""Problems. They are distinct, held-out problems are never trained on, each problem is drawn once per epoch, and wrong
problems are refused with a message."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reval.config import DataConfig, EvaluationConfig
from reval.data import _text, load_problems

ADDITIONS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(problems):
    return [json.dumps(p.prompt) for p in problems]


def test_generated_problems_are_distinct_and_held_out_ones_stay_out(tiny):
    config = DataConfig(options=ADDITIONS, template="{question} Only the number.", size=500, held_out=20)
    training, held_out, *_ = load_problems(config, tiny[1], 400)
    assert len(held_out) == 20 and len(training) > 60
    everything = questions(training) + questions(held_out)
    assert len(set(everything)) == len(everything)
    assert training[0].prompt[-1]["content"].endswith(" Only the number.")
    assert {"question", "answer", "metadata"} <= set(training[0].columns)
    assert questions(load_problems(config, tiny[1], 400)[1]) == questions(held_out)
    assert questions(load_problems(replace(config, seed=1), tiny[1], 400)[1]) != questions(held_out)


def test_a_file_of_problems(tiny, tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2", "answer": "4"}, {"prompt": chat, "answer": "x"}])
    held = jsonl(tmp_path / "h.jsonl", [{"prompt": "2+2", "answer": "4"}])
    config = DataConfig(source="jsonl", path=path, held_out_path=held, template="Q: {question}", system_prompt="S")
    training, held_out, *_ = load_problems(config, tiny[1], 400)
    system = {"role": "system", "content": "S"}
    assert [p.prompt for p in training] == [[system, {"role": "user", "content": "Q: hi"}]]
    assert training[0].where == f"{path}, row 2"
    assert held_out[0].prompt == [{"role": "system", "content": "S"}, {"role": "user", "content": "Q: 2+2"}]
    assert held_out[0].columns == {"answer": "4"}


def test_a_model_without_a_chat_template_gets_text(tiny, tmp_path):
    _, tokenizer = tiny
    tokenizer.chat_template = None
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "2+2"}])
    training, *_ = load_problems(DataConfig(source="jsonl", path=path, held_out=0), tokenizer, 400)
    assert training[0].prompt == "2+2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no problems are left"),
        ("{'a'", "line 1: not JSON"),
        ('{"answer": 1}\n', "row 1: needs `prompt`, .* it has answer"),
        ('{"prompt": "1"}\n{"prompt": "' + "x" * 50 + '"}\n', "p.jsonl, row 2: a prompt has .* 1 to 40 fit"),
        ('{"prompt": [{"from": "human", "value": "1"}]}\n', "p.jsonl, row 1: `prompt`, message 1: must be"),
    ],
)
def test_a_file_that_cannot_work(tiny, tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_problems(DataConfig(source="jsonl", path=str(path), held_out=0), tiny[1], 40)


def test_a_variable_that_the_chat_template_lacks_is_refused(tiny):
    config = DataConfig(options=ADDITIONS, size=9, held_out=1, chat_template_kwargs={"enable_thinkng": False})
    with pytest.raises(ValueError, match="chat_template_kwargs: 'enable_thinkng' would have no effect"):
        load_problems(config, tiny[1], 400)
    tiny[1].chat_template += "{% if enable_thinkng is false %}/no{% endif %}"
    assert tiny[1].decode(load_problems(config, tiny[1], 400).training[0].token_ids).endswith("/no")


def test_rows_with_one_prompt_stay_together(tiny, tmp_path):
    """Equal rows count once. Other columns make another problem, but no prompt is both trained on and held out."""
    rows = [{"prompt": str(i % 8), "answer": str(i % 2 if i % 8 < 4 else i)} for i in range(32)]
    config = DataConfig(source="jsonl", path=jsonl(tmp_path / "p.jsonl", rows), held_out=4)
    training, held_out, *_ = load_problems(config, tiny[1], 400)
    everything = [(p.prompt[0]["content"], p.columns["answer"]) for p in training + held_out]
    assert sorted(everything) == sorted({(row["prompt"], row["answer"]) for row in rows})
    assert len(everything) == 4 + 4 * 4
    assert len(set(questions(held_out))) == 4 and not set(questions(training)) & set(questions(held_out))


def test_the_digests_are_those_of_the_prompts_and_columns(tiny, tmp_path):
    rows = [{"prompt": str(i), "answer": i, "tags": ["a"]} for i in range(9)]
    config = DataConfig(source="jsonl", path=jsonl(tmp_path / "p.jsonl", rows), held_out=2)
    digests = load_problems(config, tiny[1], 400).digests
    assert load_problems(config, tiny[1], 400, EvaluationConfig(problems=1)).digests == digests
    other_order = jsonl(tmp_path / "o.jsonl", [dict(reversed(row.items())) for row in rows])
    assert load_problems(replace(config, path=other_order), tiny[1], 400).digests == digests
    changes = [
        replace(config, path=jsonl(tmp_path / "c.jsonl", [row | {"tags": ["b"]} for row in rows])),
        replace(config, template="Q {question}"),
        replace(config, seed=1),
    ]
    for changed in changes:
        new = load_problems(changed, tiny[1], 400).digests
        assert new["training"] != digests["training"] and new["held-out"] != digests["held-out"]


def test_what_differs_between_processes_is_not_in_a_digest():
    assert _text({"a": {"b", "c"}}) == _text({"a": {"c", "b"}}) != _text({"a": {"b", "d"}})
    assert _text({"a": object()}) == _text({"a": object()})


def test_a_generator_that_cannot_work(tiny):
    with pytest.raises(ValueError, match="data.name='no_such_set'"):
        load_problems(DataConfig(name="no_such_set"), tiny[1], 400)
    with pytest.raises(ValueError, match="no file 'gone.jsonl'"):
        load_problems(DataConfig(source="jsonl", path="gone.jsonl"), tiny[1], 400)


def test_a_hub_data_set_with_columns_of_its_own(tiny, monkeypatch):
    asked = []

    def read_hub(*where):
        asked.append(where)
        return iter([{"problem": f"{i}+1", "reward_model": {"ground_truth": i + 1}} for i in range(5)])

    monkeypatch.setattr("reval.data.read_hub", read_hub)
    columns = {"prompt": "problem", "answer": "reward_model.ground_truth"}
    config = DataConfig(source="hub", name="a/b", subset="c", split="s", columns=columns, held_out=2)
    training, held_out, *_ = load_problems(config, tiny[1], 400)
    assert asked == [("a/b", "c", "s")] and (len(training), len(held_out)) == (3, 2)
    assert {(p.prompt[-1]["content"], p.columns["answer"]) for p in training + held_out} == {
        (f"{i}+1", i + 1) for i in range(5)
    }


def test_benchmarks_come_after_the_held_out_problems_and_out_of_training(tiny, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": str(i), "answer": i} for i in range(20)])
    own = jsonl(tmp_path / "own.jsonl", [{"prompt": str(i), "answer": i} for i in (3, 4, 100)])
    jsonl(tmp_path / "aime24.jsonl", [{"problem": "5", "answer": "5"}, {"problem": "a", "answer": "b"}])
    config = DataConfig(source="jsonl", path=path, held_out=2, template="T {question}")
    evaluation = EvaluationConfig(benchmarks=["aime24", own], folder=str(tmp_path))
    training, answered, *_ = load_problems(config, tiny[1], 400, evaluation)
    assert [p.benchmark for p in answered] == [None] * 2 + ["aime24"] * 2 + ["own"] * 3
    assert [p.prompt[-1]["content"] for p in answered[2:]] == ["T 5", "T a", "T 3", "T 4", "T 100"]
    assert answered[3].columns == {"answer": "b"}
    assert not set(questions(training)) & set(questions(answered))
    assert len(training) + 2 + len({"3", "4", "5"} - {p.prompt[-1]["content"][2:] for p in answered[:2]}) == 20
    own_template = replace(evaluation, template="B {question}")
    same, answered, *_ = load_problems(config, tiny[1], 400, own_template)
    assert [p.prompt[-1]["content"][0] for p in answered] == ["T"] * 2 + ["B"] * 5
    assert questions(same) == questions(training)


def test_a_sub_sample_is_fixed_and_nothing_of_the_set_is_trained_on(tiny, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": str(i)} for i in range(30)])
    held = jsonl(tmp_path / "h.jsonl", [{"prompt": str(i)} for i in range(10)])
    bench = jsonl(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "answer": i} for i in range(10)])
    config = DataConfig(source="jsonl", path=path, held_out_path=held)
    evaluation = EvaluationConfig(benchmarks=[bench], problems=4)
    training, answered, *_ = load_problems(config, tiny[1], 400, evaluation)
    assert [p.benchmark for p in answered] == [None] * 4 + ["b"] * 4
    assert {p.prompt[0]["content"] for p in training} == {str(i) for i in range(10, 30)}
    chosen = questions(answered)
    assert chosen[:4] == sorted(chosen[:4]) and chosen[4:] == sorted(chosen[4:])
    assert questions(load_problems(config, tiny[1], 400, replace(evaluation, samples=9))[1]) == chosen
    assert questions(load_problems(replace(config, seed=1), tiny[1], 400, evaluation)[1]) != chosen
    assert len(load_problems(config, tiny[1], 400, replace(evaluation, problems=99))[1]) == 20
