"""Rows of rollouts: what is read, what is refused, and how the rewards are shaped. The tiny model has 102 tokens and a
context of 512."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from made import offline_components

from reval import rollout_log
from reval.replay import Trajectory
from reval.rewards import RewardPool, Scores
from reval.rollout_log import load_rollouts, rollout_rows

ROW = {"prompt_ids": [1, 2], "response_ids": [3, 4], "reward": 1}


@pytest.fixture(scope="module")
def pool():
    with RewardPool("number", workers=1) as pool:
        yield pool


@pytest.fixture
def read(tmp_path, tiny_config, tiny, pool):
    """A function that returns the Preload of a file with the given rows."""

    def read(*rows, shaping="plain", held_out=()):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        replay = replace(tiny_config.replay, preload=str(path), preload_shaping=shaping)
        return load_rollouts(replace(tiny_config, replay=replay), offline_components(*tiny, pool, held_out))

    return read


@pytest.fixture
def load(read):
    """The trajectories of `read`."""
    return lambda *rows, **options: read(*rows, **options).trajectories


def test_rows_become_trajectories(load):
    other = {"response_ids": [5, 6, 7], "reward": -0.5, "action_mask": [True, False, 1], "finished": False}
    first, second = load(ROW, ROW | other | {"iteration": 3})
    assert first.token_ids.tolist() == [1, 2, 3, 4] and first.action_mask.tolist() == [False, False, True, True]
    assert (second.reward, second.score, second.iteration, second.uses) == (-0.5, -0.5, 0, 0)
    assert second.action_mask.tolist() == [False, False, True, False, True]
    assert first.finished and not second.finished


def test_what_is_written_is_read_back(load):
    mask = np.array([False, False, True, False, True])
    one = Trajectory(np.arange(5), mask, reward=9.0, score=0.25, iteration=7, finished=False)
    two = Trajectory(np.arange(4), np.array([False, True, True, True]), reward=9.0, score=1.0, iteration=7)
    rows = rollout_rows([one, two], [0, 1])
    assert "action_mask" in rows[0] and "action_mask" not in rows[1] and rows[0]["iteration"] == 7
    for read, written in zip(load(*rows), (one, two), strict=True):
        assert read.token_ids.tolist() == written.token_ids.tolist()
        assert read.action_mask.tolist() == written.action_mask.tolist()
        assert (read.reward, read.score, read.finished) == (written.score, written.score, written.finished)


def test_rewards_are_shaped_as_fresh_ones_within_prompt_and_iteration(load):
    rows = [
        ROW | {"reward": 1},
        ROW | {"reward": 0},
        ROW | {"prompt_ids": [9], "reward": 1},
        ROW | {"reward": 0.5, "iteration": 2},
        ROW | {"reward": 0.5, "iteration": 2},
    ]
    assert [t.reward for t in load(*rows, shaping="centered")] == [0.5, -0.5, 0.0, 0.0, 0.0]
    assert [t.reward for t in load(*rows, shaping="same")] == [1.0, -1.0, 1.0, 0.0, 0.0], "tiny.yaml: plus_minus_one"
    assert [t.score for t in load(*rows, shaping="same")] == [1.0, 0.0, 1.0, 0.5, 0.5]
    grouped = [ROW | {"reward": r, "group": g, "iteration": 1} for r, g in ((1, 0), (0, 0), (1, 1), (1, 1))]
    assert [t.reward for t in load(*grouped, shaping="centered")] == [0.5, -0.5, 0.0, 0.0], "equal prompts, two groups"
    for shaping in ("centered", "normalized", "soft_centered"):
        with pytest.raises(ValueError, match="every prompt has one response.*replay.preload_shaping=plain"):
            load(ROW, ROW | {"iteration": 1}, shaping=shaping)
    soft = 0.1 * math.log((1 + math.exp(10)) / 2)  # tiny.yaml has beta = 0.1
    assert [t.reward for t in load(*rows[:2], shaping="soft_centered")] == pytest.approx([1 - soft, -soft])
    fresh = 1 << 32  # the first group that a run generates
    assert [t.group for t in load(*rows)] == [-1, -1, -2, -3, -3] and all(t.group < fresh for t in load(*grouped))
    with pytest.raises(ValueError, match=r"replay.preload: .*rewards\[0\] is 3"):
        load(ROW | {"reward": 3}, shaping="plus_minus_one")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [1], "reward": 1}, "row 2: has no 'response_ids'"),
        (ROW | {"mask": [True, True]}, "row 2: unknown key 'mask'; did you mean 'action_mask'"),
        (ROW | {"log_probs": [0, 0]}, "row 2: unknown key 'log_probs'; the keys are prompt_ids, "),
        (ROW | {"action_mask": [True]}, r"row 2: action_mask must have one entry per token of the response \(2\)"),
        (ROW | {"action_mask": [2, 3]}, "row 2: action_mask must be a list of true and false"),
        (ROW | {"action_mask": [False, False]}, "row 2: action_mask marks no token"),
        (ROW | {"response_ids": [102]}, "row 2: response_ids must be .* from 0 to 101; got 102"),
        (ROW | {"prompt_ids": [-1]}, "row 2: prompt_ids must be .* from 0 to 101; got -1"),
        (ROW | {"response_ids": [1.5]}, "row 2: response_ids must be a list of at least one whole number"),
        (ROW | {"response_ids": []}, "row 2: response_ids must be a list of at least one whole number"),
        (ROW | {"prompt_ids": []}, "row 2: prompt_ids must be a list of at least one whole number"),
        (ROW | {"prompt_ids": [5] * 511}, "row 2: has 513 tokens, but the model's context has 512"),
        (ROW | {"reward": None}, "row 2: reward must be a number; got None"),
        (ROW | {"reward": "1"}, "row 2: reward must be a number; got '1'"),
        (ROW | {"reward": float("nan")}, "row 2: reward must be finite"),
        ([1], "line 2: not a JSON object"),
    ],
)
def test_broken_rows_are_named(load, row, message):
    with pytest.raises(ValueError, match=f"replay.preload: .*{message}"):
        load(ROW, row)


def test_a_missing_or_empty_file_is_named(load, tiny_config, tiny):
    config = replace(tiny_config, replay=replace(tiny_config.replay, preload="nowhere.jsonl"))
    with pytest.raises(ValueError, match="replay.preload: there is no file 'nowhere.jsonl'"):
        load_rollouts(config, offline_components(*tiny))
    with pytest.raises(ValueError, match="has no rows"):
        load()


TEXT = {"prompt": "2 + 3", "response": "5", "answer": "5"}


def test_texts_become_the_tokens_that_the_model_would_see(read, tiny):
    """The chat template formats the prompt; data.template of tiny.yaml does not, because a log has it already."""
    chat = [{"role": "system", "content": "add"}, {"role": "user", "content": "2 + 3"}]
    rows = read(TEXT, TEXT | {"prompt": chat, "response": "4", "finished": False}, TEXT | {"response": "5<|end|>"})
    texts = [tiny[1].decode(t.token_ids) for t in rows.trajectories]
    assert texts[0] == "<|user|>2 + 3<|end|><|assistant|>5<|end|>"
    assert texts[1] == "<|system|>add<|end|><|user|>2 + 3<|end|><|assistant|>4"
    assert texts[2] == texts[0], "an end that is in the text is not added again"
    assert [int(t.action_mask.sum()) for t in rows.trajectories] == [2, 1, 2]
    assert [t.finished for t in rows.trajectories] == [True, False, True]


def test_a_row_without_a_reward_is_scored_with_its_columns(read):
    ids = {"prompt_ids": [1, 2], "response": "5", "reward": 0.25}
    rows = read(TEXT, TEXT | {"response": "6"}, ids, TEXT | {"answer": "6"})
    assert [t.score for t in rows.trajectories] == [1.0, 0.0, 0.25, 0.0]
    assert [t.reward for t in read(TEXT, TEXT | {"response": "6"}, shaping="centered").trajectories] == [0.5, -0.5]


def test_rollouts_without_a_score_are_left_out(read, monkeypatch):
    def scored(problems, responses, pool, tokenizer):
        return [], Scores([None, 1.0, None][: len(problems)], 1, 1, "it raised")

    monkeypatch.setattr(rollout_log, "score", scored)
    found = read(TEXT, TEXT, TEXT, ROW)
    assert [t.score for t in found.trajectories] == [1.0, 1.0]
    assert (found.unscored, found.exceptions) == (2, ["it raised"])
    assert found.notes(9) == ["replay.preload: left out 2 rollouts, which reward.function could not score"]
    with pytest.raises(ValueError, match="none of 1 responses has a score.*\nit raised"):
        read(TEXT)


def test_rollouts_of_evaluation_problems_are_left_out(read):
    found = read(ROW, ROW | {"prompt_ids": [1, 3]}, ROW | {"prompt_ids": [1, 3]}, held_out=[(1, 2)])
    assert [t.token_ids.tolist() for t in found.trajectories] == [[1, 3, 3, 4]] * 2 and found.held_out == 1
    assert found.notes(1) == [
        "replay.preload: left out 1 rollouts, whose prompts the evaluation asks",
        "replay.preload has 2 rollouts, of which the last 1 stay (replay.capacity)",
    ]
    with pytest.raises(ValueError, match="log.jsonl: every rollout answers a problem of the evaluation"):
        read(ROW, held_out=[(1, 2)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "5", "answer": "5"}, "row 2: has no 'prompt_ids' and no 'prompt'"),
        (TEXT | {"prompt_ids": [1]}, "row 2: must have 'prompt_ids' or 'prompt', not both"),
        (TEXT | {"response_ids": [1]}, "row 2: must have 'response_ids' or 'response', not both"),
        (TEXT | {"action_mask": [True, True]}, "row 2: action_mask must come with response_ids"),
        (TEXT | {"prompt": 7}, "row 2: prompt must be a text or a list of chat messages; got 7"),
        (TEXT | {"prompt": [{"role": "me", "content": "x"}]}, "row 2: `prompt`, message 1: `role` must be one of"),
        (TEXT | {"prompt": " "}, "row 2: `prompt` must not be empty"),
        (TEXT | {"response": None}, "row 2: response must be a text; got None"),
        (TEXT | {"response": "", "finished": False}, "row 2: response must give at least one token"),
        (TEXT | {"rewrd": 1}, "row 2: unknown key 'rewrd'; did you mean 'reward'"),
        (TEXT | {"reward": 1}, "row 2: unknown key 'answer'; "),
        (TEXT | {"answer": "five"}, "row 2: has no 'reward', and reward.function=number cannot score it: .*'five'"),
        ({"prompt": "a", "response": "b"}, "row 2: has no 'reward', and reward.function=number cannot score it: "),
        (TEXT | {"prompts": "x"}, "row 2: unknown key 'prompts'; did you mean 'prompt'"),
        (TEXT | {"completions": "x"}, "row 2: .*the column 'completions' must have another name"),
        (TEXT | {"response": "5" * 512}, r"row 2: has \d+ tokens, but the model's context has 512"),
    ],
)
def test_broken_rows_of_text_are_named(load, row, message):
    with pytest.raises(ValueError, match=f"replay.preload: .*{message}"):
        load(TEXT, row)
