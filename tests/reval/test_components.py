"""The components of a run: which problems they accept, and that every process has those of the main process."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

import reval.components
from reval.components import build
from reval.config import ConfigError, load_config
from reval.data import Problem, Problems
from reval.distributed import World


def configured(folder, rows, *overrides):
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.path={path}", "data.source=jsonl", "data.held_out=0", "reward.workers=1", *overrides]
    return load_config(["configs/tiny.yaml"], settings)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"answer": "n/a"}, [], "row 2: column 'answer' must hold numbers .* 'n/a'"),
        ({"answr": "1"}, [], "row 2: .* needs the column 'answer'.* did you mean 'answr'"),
        ({"answer": " "}, ["reward.function=math"], "row 2: column 'answer' must hold LaTeX .* ' '"),
        ({"answer": None}, ["reward.function=math"], "row 2: column 'answer' must hold LaTeX .* None"),
        (
            {"answer": "1", "question": "?", "metadata": {}},
            ["reward.function=reasoning_gym"],
            "row [12]: .* needs",
        ),
        ({"answer": "1", "completions": "x"}, [], "row 2: the column 'completions' must have another name"),
        ({"answer": "1"}, ["rollout.max_new_tokens=512"], "max_new_tokens=512 leaves no room .* 512 tokens"),
    ],
)
def test_a_problem_that_cannot_be_used_is_named_at_the_start(tmp_path, row, settings, message):
    config = configured(tmp_path, [{"prompt": "1", "answer": 0}, {"prompt": "2"} | row], *settings)
    with pytest.raises(ConfigError, match=message), build(config):
        pass


def test_a_token_outside_the_vocabulary_is_named(tmp_path, monkeypatch):
    load_model = reval.components.load_model

    def larger(*arguments):
        model, tokenizer = load_model(*arguments)
        tokenizer.add_tokens(["<|new|>"])
        return model, tokenizer

    monkeypatch.setattr(reval.components, "load_model", larger)
    with pytest.raises(ConfigError, match=r"row 1: the token 102 \('<\|new\|>'\) is not in .* of 102"):
        with build(configured(tmp_path, [{"prompt": "a<|new|>", "answer": "1"}])):
            pass


def test_every_process_has_the_problems_of_the_main_process(tmp_path, monkeypatch):
    made = Problems([Problem("p", [7], {"answer": "1"})], [], {"training": "d"}, frozenset())

    class Other(World):
        """A process that is not the main process."""

        def from_main(self, make):
            return made

    @contextmanager
    def world(*arguments):
        yield Other()

    monkeypatch.setattr(reval.components, "world", world)
    config = configured(tmp_path, [{"prompt": "other", "answer": "1"}])
    with build(config) as components:
        assert components.training_problems is made.training and components.problem_digests == {"training": "d"}


@pytest.mark.parametrize(
    ("overrides", "context"),
    [
        ([], 512),
        (["rollout.engine=vllm", "rollout.vllm_options.max_model_len=40"], 40),
        (["rollout.engine=vllm", "rollout.vllm_options.max_model_len=4000"], 512),
        (["rollout.engine=vllm"], 512),
    ],
)
def test_a_conversation_ends_at_the_context_of_the_engine(tiny, overrides, context):
    config = load_config(["configs/tiny.yaml"], overrides)
    assert reval.components._engine_context(tiny[0], config) == context
