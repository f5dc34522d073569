"""Reward shaping against numbers computed by hand. Groups have different sizes, are interleaved, and have responses
without a score."""

import math

import pytest

from reval.rewards.shaping import reward_metrics, shape_rewards

REWARDS = [1.0, 0.0, None, 1.0, 0.0, None, 1.0]
GROUPS = [5, 2, 5, 2, 5, 9, 2]  # group 5: 1, None, 0; group 2: 0, 1, 1; group 9: None


def test_plain_is_a_copy():
    shaped = shape_rewards(REWARDS, GROUPS, "plain")
    assert shaped == REWARDS and shaped is not REWARDS


def test_centered_subtracts_the_mean_of_the_scored_responses_of_the_group():
    shaped = shape_rewards(REWARDS, GROUPS, "centered")
    assert shaped == [0.5, pytest.approx(-2 / 3), None, pytest.approx(1 / 3), -0.5, None, pytest.approx(1 / 3)]


def test_centered_is_exactly_zero_in_a_group_of_equal_rewards():
    # 0.1 + 0.1 + 0.1 is not 0.3 in floating point. Without care, the difference would become a reward that is not 0.
    assert shape_rewards([0.1] * 3, [0] * 3, "centered") == [0.0] * 3
    assert reward_metrics([0.1] * 3, [0] * 3)["frac_reward_zero_std"] == 1.0


def test_normalized_divides_by_the_deviation_and_leaves_groups_without_signal_at_zero():
    shaped = shape_rewards(REWARDS, GROUPS, "normalized")
    assert shaped == [1.0, pytest.approx(-(2**0.5)), None, pytest.approx(0.5**0.5), -1.0, None, pytest.approx(0.5**0.5)]
    assert shape_rewards([0.1] * 3, [0] * 3, "normalized") == [0.0] * 3


NOISE = [
    [0.9999999999999999, 1.0, 1.0, 1.0],  # as from a sum of ten times 0.1
    [1.0, 1.0 + 1e-16, 0.99999994],  # 0.99999994 is the float32 below 1
    [0.0, 5.6e-17, -1e-17],  # 0.1 + 0.2 - 0.3
    [1e12, 1e12 + 0.001],
]


@pytest.mark.parametrize("rewards", NOISE)
def test_rewards_that_differ_by_rounding_are_equal(rewards):
    groups = [3] * len(rewards)
    assert shape_rewards(rewards, groups, "normalized") == [0.0] * len(rewards)
    assert shape_rewards(rewards, groups, "centered") == [0.0] * len(rewards)
    metrics = reward_metrics(rewards, groups)
    assert metrics["frac_reward_zero_std"] == 1.0 and metrics["reward_std"] == 0.0


def test_small_rewards_that_differ_are_no_rounding():
    assert shape_rewards([0.0, 1e-4], [0, 0], "normalized") == [-1.0, 1.0]


def test_soft_centered_subtracts_beta_log_mean_exp():
    shaped = shape_rewards(REWARDS, GROUPS, "soft_centered", beta=0.5)
    five, two = (0.5 * math.log(x) for x in ((math.exp(2) + 1) / 2, (1 + 2 * math.exp(2)) / 3))
    assert shaped == pytest.approx([1 - five, 0 - two, None, 1 - two, 0 - five, None, 1 - two])
    for i in (0, 3):  # a small beta: the largest reward of the group. exp(r / beta) alone would overflow
        assert shape_rewards(REWARDS, GROUPS, "soft_centered", beta=1e-4)[i] == pytest.approx(0, abs=1e-3)
    mean = shape_rewards(REWARDS, GROUPS, "centered")
    assert shape_rewards(REWARDS, GROUPS, "soft_centered", beta=1e6) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("rewards", NOISE)
def test_soft_centered_is_exactly_zero_in_a_group_of_equal_rewards(rewards):
    assert shape_rewards(rewards, [3] * len(rewards), "soft_centered", beta=0.01) == [0.0] * len(rewards)


def test_batch_normalized_takes_all_responses_as_one_group():
    shaped = shape_rewards(REWARDS, GROUPS, "batch_normalized")
    up, down = (2 / 3) ** 0.5, -((3 / 2) ** 0.5)  # mean 3/5, deviation sqrt(6)/5
    assert shaped == pytest.approx([up, down, None, up, down, None, up])
    assert shape_rewards([0.3, 0.3, None], [0, 1, 2], "batch_normalized") == [0.0, 0.0, None]


def test_plus_minus_one():
    assert shape_rewards([1.0000000000000002, -1e-17], [0, 0], "plus_minus_one") == pytest.approx([1.0, -1.0])
    assert shape_rewards([0.0, 0.25, 1.0, None], [0] * 4, "plus_minus_one") == [-1.0, -0.5, 1.0, None]


def test_plus_minus_one_refuses_rewards_outside_0_to_1():
    with pytest.raises(ValueError, match=r"rewards\[1\] is 1.5"):
        shape_rewards([0.0, 1.5], [0, 0], "plus_minus_one")


def test_unknown_shaping_names_the_nearest():
    with pytest.raises(ValueError, match="'centred'; did you mean 'centered'"):
        shape_rewards([], [], "centred")


@pytest.mark.parametrize("call", [lambda: shape_rewards([1.0], [], "plain"), lambda: reward_metrics([1.0], [])])
def test_lengths_must_agree(call):
    with pytest.raises(ValueError, match="groups must have one entry per reward"):
        call()


def test_metrics():
    metrics = reward_metrics(REWARDS, GROUPS)
    assert metrics == {
        "reward": pytest.approx(3 / 5),
        "reward_std": pytest.approx((0.5 + (2 / 9) ** 0.5) / 2),
        "frac_reward_zero_std": 0.0,
        "reward_unscored": pytest.approx(2 / 7),
    }
    # Group 2 has no scored response, so only the groups 0 and 1 count.
    assert reward_metrics([1.0, 1.0, 0.0, 1.0, None], [0, 0, 1, 1, 2])["frac_reward_zero_std"] == 0.5


def test_nothing_to_summarise():
    assert reward_metrics([], []) == {}
    assert reward_metrics([None, None], [0, 0]) == {"reward_unscored": 1.0}
    assert shape_rewards([], [], "centered") == []
    assert shape_rewards([None], [0], "centered") == [None]
