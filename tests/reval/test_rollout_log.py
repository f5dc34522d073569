"""Rows of rollouts: what is read, what is refused, and how the rewards are shaped. The tiny model has 102 tokens and a
context of 512."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from reval.replay import Trajectory
from reval.rollout_log import load_rollouts, rollout_rows

ROW = {"prompt_ids": [1, 2], "response_ids": [3, 4], "reward": 1}


@pytest.fixture
def load(tmp_path, tiny_config, tiny):
    def load(*rows, shaping="plain"):
        path = tmp_path / "log.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        replay = replace(tiny_config.replay, preload=str(path), preload_shaping=shaping)
        return load_rollouts(replace(tiny_config, replay=replay), tiny[0])

    return load


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
    rows = rollout_rows([one, two])
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
    with pytest.raises(ValueError, match="every prompt has one response.*replay.preload_shaping=plain"):
        load(ROW, ROW | {"iteration": 1}, shaping="centered")
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
    with pytest.raises(ValueError, match="replay.preload: there is no file 'nowhere.jsonl'"):
        load_rollouts(replace(tiny_config, replay=replace(tiny_config.replay, preload="nowhere.jsonl")), tiny[0])
    with pytest.raises(ValueError, match="has no rows"):
        load()
