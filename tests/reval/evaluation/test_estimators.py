"""Estimators on so few answers that every subset can be enumerated by hand."""

from __future__ import annotations

from itertools import combinations

import pytest

from reval.evaluation.estimators import best, is_right, majority, over_blocks, pass_at_k


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_mean_over_all_subsets(right, k):
    scores = [1.0] * right + [0.0] * (5 - right)
    subsets = list(combinations(scores, k))
    assert pass_at_k(scores, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_stays_exact_where_factorials_overflow_a_float():
    assert pass_at_k([1.0] + [0.0] * 1999, 1000) == pytest.approx(0.5, abs=1e-12)


def test_a_full_score_is_right_up_to_rounding():
    scores = [0.9999999999999999, 0.0]
    assert is_right(sum([0.1] * 10)) and pass_at_k(scores, 2) == 1.0 and not is_right(0.9999)


def test_only_a_full_score_is_right():
    assert [is_right(s) for s in (1.0, 1, 2.0, 0.99, 0.0, -1.0, None)] == [True, True, True, False, False, False, False]
    assert pass_at_k([None, 0.5], 2) == 0.0


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["8", "8", "7"], [0, 0, 1], 0.0),
        (["7", "8"], [1, 0], 0.5),  # a tie
        (["7", "8", "9", "7", "8"], [1, 0, 0, 1, 0], 0.5),  # a tie of two among three
        (["7", "8", "9"], [1, 0, 0], 1 / 3),
        ([None, None, "7"], [0, 0, 1], 1.0),  # None has no vote
        ([None, None], [0, None], 0.0),
        (["7", "7", "8"], [None, 1, 1], 0.5),  # equal answers with different scores
    ],
)
def test_majority(answers, scores, expected):
    assert majority(answers, scores) == pytest.approx(expected)


def test_best_takes_the_largest_value_and_averages_ties():
    assert best([-3.0, -1.0, -2.0], [0, 1, 0]) == 1.0
    assert best([-1.0, -3.0, -1.0], [0, 1, 1]) == 0.5
    assert best([-1.0, -3.0], [None, 1]) == 0.0


def test_blocks_are_disjoint_and_the_rest_is_left_out():
    seen = []

    def estimator(values, others):
        assert [v + 10 for v in values] == others
        seen.append(values)
        return float(values[0])

    assert over_blocks(estimator, 2, [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]) == 2.0
    assert seen == [[1, 2], [3, 4]]


@pytest.mark.parametrize("k", [0, 3])
def test_a_k_that_does_not_fit(k):
    for estimate in (lambda: pass_at_k([1, 0], k), lambda: over_blocks(best, k, [1, 0], [1, 0])):
        with pytest.raises(ValueError, match=r"k must be from 1 to the number of answers \(2\)"):
            estimate()
