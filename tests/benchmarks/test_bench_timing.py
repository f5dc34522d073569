"""Turns, rounds and statistics, with a simulated clock, so that the tests do not depend on the machine's speed."""

import pytest

from benchmarks.timing import interleave, summary, turns


class CountingClock:
    """The n-th call takes n seconds."""

    def __init__(self):
        self.calls = 0

    def seconds(self, call):
        self.calls += 1
        return float(self.calls), call()


def test_turns_spend_the_budget_within_bounds():
    assert turns({"fast": 1e-6, "middling": 0.5, "slow": 9.0, "at once": 0.0}, budget=5, least=3, most=25) == {
        "fast": 25,
        "middling": 10,
        "slow": 3,
        "at once": 25,
    }


def test_everyone_gets_their_turns_spread_over_the_rounds():
    order, names = [], {"a": 12, "b": 4, "none": 0}
    samples = {name: [] for name in names}
    interleave({n: lambda n=n: order.append(n) for n in names}, names, CountingClock(), samples)
    assert {n: len(s) for n, s in samples.items()} == names
    gaps = [order[: i + 1].count("a") for i, n in enumerate(order) if n == "b"]
    assert all(abs(b - a - 3) <= 1 for a, b in zip(gaps, gaps[1:], strict=False)), order  # one b after every three a


def test_the_order_within_a_round_changes():
    order = []
    interleave({n: lambda n=n: order.append(n) for n in "ab"}, {"a": 20, "b": 20}, CountingClock(), {"a": [], "b": []})
    rounds = {tuple(order[i : i + 2]) for i in range(0, 40, 2)}
    assert rounds == {("a", "b"), ("b", "a")}


def test_preparation_comes_before_each_call_and_what_was_measured_survives_an_interrupt():
    done, samples = [], {"a": []}

    def call():
        done.append("call")
        if done.count("call") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interleave({"a": call}, {"a": 5}, CountingClock(), samples, {"a": lambda: done.append("prepare")})
    assert samples == {"a": [1.0, 2.0]} and done == ["prepare", "call"] * 3


def test_turns_end_with_a_failure_and_the_others_go_on():
    def fails():
        raise RuntimeError("no memory")

    samples = {"a": [], "b": []}
    failures = interleave({"a": fails, "b": lambda: None}, {"a": 5, "b": 5}, CountingClock(), samples)
    assert str(failures.pop("a")) == "no memory" and not failures
    assert samples["a"] == [] and len(samples["b"]) == 5


def test_summary_is_median_and_quartiles():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "runs": 5}
    assert summary([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "runs": 1}
