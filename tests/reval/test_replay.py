"""The buffer is compared with a list that keeps every trajectory. `check` runs after every operation."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from reval.replay import ReplayBuffer, Trajectory


def trajectory(reward: float = 0.0, iteration: int = 0) -> Trajectory:
    return Trajectory(
        token_ids=np.array([1, 2, 3]),
        action_mask=np.array([False, True, True]),
        reward=reward,
        score=reward,
        iteration=iteration,
    )


@given(st.integers(1, 20), st.lists(st.integers(0, 15), max_size=12))
def test_the_buffer_has_exactly_the_newest_trajectories(capacity, pushes):
    buffer, everything = ReplayBuffer(capacity), []
    for count in pushes:
        new = [trajectory() for _ in range(count)]
        buffer.add(new)
        everything += new
        buffer.check()
        assert list(buffer) == everything[-capacity:]
        assert len(buffer) == min(capacity, len(everything)) and buffer.added == len(everything)


@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 2**32))
def test_samples_are_distinct_and_from_the_buffer(held, count, seed):
    buffer = ReplayBuffer(30)
    buffer.add([trajectory() for _ in range(held)])
    drawn = buffer.sample(count, Random(seed))
    assert len(drawn) == min(count, held) == len({id(t) for t in drawn})
    assert {id(t) for t in drawn} <= {id(t) for t in buffer}


def test_samples_are_uniform():
    buffer = ReplayBuffer(10)
    buffer.add([trajectory(reward=i) for i in range(10)])
    rng = Random(0)
    seen = Counter(t.reward for _ in range(4000) for t in buffer.sample(3, rng))
    # 1200 expected each, standard deviation 29: 6 sigma
    assert all(abs(seen[i] - 1200) < 6 * 29 for i in range(10)), seen


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.integers(1, 40), st.integers(0, 2**32))
def test_groups_are_drawn_whole(sizes, count, seed):
    buffer = ReplayBuffer(100)
    made = [Trajectory([1, 2], [False, True], 0.0, 0.0, 1, group=g) for g, n in enumerate(sizes) for _ in range(n)]
    Random(seed).shuffle(made)
    buffer.add(made)
    drawn = Counter(t.group for t in buffer.sample(count, Random(seed), "groups"))
    assert all(drawn[group] == sizes[group] for group in drawn), "a part of a group"
    assert drawn.total() <= count or len(drawn) == 1
    assert drawn, "no group: even one that is too large is better than nothing"
    if drawn.total() < count:
        left = [n for group, n in enumerate(sizes) if group not in drawn]
        assert not left or drawn.total() + max(left) > count, "one more group would have fitted"


def test_groups_are_drawn_uniformly():
    buffer = ReplayBuffer(20)
    buffer.add([Trajectory([1, 2], [False, True], 0.0, 0.0, 1, group=i % 5) for i in range(20)])
    rng = Random(0)
    seen = Counter(t.group for _ in range(1000) for t in buffer.sample(9, rng, "groups"))
    # two whole groups a draw: 400 draws expected of each group, 4 trajectories a draw, standard deviation 15.5 draws
    assert all(abs(seen[i] / 4 - 400) < 6 * 15.5 for i in range(5)), seen


def test_the_sample_depends_only_on_the_generator():
    buffer = ReplayBuffer(10)
    buffer.add([trajectory(reward=i) for i in range(10)])
    assert buffer.sample(4, Random(1)) == buffer.sample(4, Random(1)) != buffer.sample(4, Random(2))


def test_age_and_reuse():
    buffer = ReplayBuffer(4)
    buffer.add([trajectory(iteration=1), trajectory(iteration=1), trajectory(iteration=3)])
    next(iter(buffer)).uses = 6
    assert buffer.metrics(4) == {"buffer/size": 3, "buffer/age_mean": (3 + 3 + 1) / 3, "buffer/reuse_mean": 2.0}
    assert ReplayBuffer(4).metrics(1) == {"buffer/size": 0, "buffer/age_mean": 0.0, "buffer/reuse_mean": 0.0}


def test_a_saved_state_loads_from_a_file(tmp_path, trajectories):
    """Trajectories without reference values, with sums only, and with token values too; with and without behaviour
    log-probs. A buffer can have all these kinds, for example after a reset of the reference."""
    buffer, other, smaller = ReplayBuffer(5), ReplayBuffer(5), ReplayBuffer(2)
    members = trajectories(8, turns=2)
    for i, t in enumerate(members):
        t.uses, t.finished, t.iteration, t.group = i, i % 2 == 0, 3 * i, (i << 32) + 1 - 2 * (i == 7)
        if i % 4 > 1:
            t.behavior = np.random.default_rng(i).random(int(t.action_mask.sum()), np.float32)
        if i % 3:
            t.reference = {"version": i, "v": 1 / (i + 1), "log_prob": -1e5 / 3, "returns": -1e5 / 7}
        if i % 3 == 2:
            t.reference["values"] = np.random.default_rng(i).random((int(t.action_mask.sum()), 3), np.float32)
    buffer.add(members)
    save_file(buffer.state(), tmp_path / "replay.safetensors")
    for one in (other, smaller):
        one.load_state(load_file(tmp_path / "replay.safetensors"))
    assert len(other) == 5 and other.added == smaller.added == 8
    for a, b in [*zip(other, members[3:], strict=True), *zip(smaller, members[6:], strict=True)]:
        assert (a.reward, a.score, a.uses) == (b.reward, b.score, b.uses)
        assert (a.finished, a.iteration, a.group) == (b.finished, b.iteration, b.group)
        assert (a.behavior is None) == (b.behavior is None)
        np.testing.assert_array_equal(a.behavior, b.behavior)
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.action_mask.tolist() == b.action_mask.tolist()
        assert a.reference.keys() == b.reference.keys()
        for key, value in a.reference.items():
            np.testing.assert_array_equal(value, b.reference[key])


def test_the_state_of_an_empty_buffer_loads():
    buffer = ReplayBuffer(3)
    buffer.load_state(ReplayBuffer(3).state())
    assert len(buffer) == 0 and buffer.sample(2, Random(0)) == []


def test_check_sees_a_broken_buffer():
    buffer, t = ReplayBuffer(5), trajectory()
    buffer.add([t, t])
    with pytest.raises(AssertionError, match="buffer has one trajectory twice"):
        buffer.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [1, 2]}, "one length"),
        ({"action_mask": [False] * 3}, "marks no token"),
        ({"action_mask": [True] * 3}, "first token"),
        ({"reward": float("nan")}, "reward must be finite"),
    ],
)
def test_a_broken_trajectory_is_refused(changes, message):
    good = {"token_ids": [1, 2, 3], "action_mask": [False, True, True], "reward": 0.0, "score": 0.0, "iteration": 0}
    with pytest.raises(ValueError, match=message):
        Trajectory(**{**good, **changes})


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        ReplayBuffer(0)
