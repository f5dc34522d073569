"""The lag of V(s_1), and what a run says about settings that learn badly."""

import math

import pytest
import torch

from reval.advice import ITERATIONS, LAG, ValueLag, at_start, value_lag
from reval.config import load_config
from reval.loop import train
from reval.metric_names import TRAINING, check_best_metric


def residuals(right: float, v: float, beta: float = 0.5) -> torch.Tensor:
    """Residuals of four responses of a policy that is right with the given probability (a multiple of 1/4), so the
    batch has exactly this share. The reference is right with probability 1/2, and V(s_1) - V_ref(s_1) = v."""
    outcomes = [1.0] * round(4 * right) + [0.0] * round(4 * (1 - right))
    return torch.tensor([v + math.log((right if r else 1 - right) / 0.5) - r / beta for r in outcomes])


@pytest.mark.parametrize("right", [0.25, 0.5, 0.75])
def test_the_lag_is_that_of_v_behind_log_z_for_every_policy(right):
    log_z = math.log(0.5 * math.exp(1 / 0.5) + 0.5)
    for v in (0.0, 0.5, log_z):
        assert value_lag(residuals(right, v)) == pytest.approx(log_z - v, abs=1e-6)


def test_prompts_with_different_z_do_not_lag_at_the_optimum():
    """log Z of the prompts is about 9.3 and 1.4. The log of the mean of both Z lies 3.3 above the mean of both logs."""
    batch = []
    for beta in (0.1, 0.5):
        log_z = math.log(0.5 * math.exp(1 / beta) + 0.5)
        batch.append(residuals(0.5, log_z, beta))
        assert value_lag(batch[-1]) == pytest.approx(0.0, abs=1e-6)
    assert value_lag(torch.cat(batch)) == pytest.approx(0.0, abs=1e-6)
    assert value_lag(torch.tensor([-800.0, 0.0])) == pytest.approx(800 - math.log(2)), "exp(800) has no float"


def watch(lags, *overrides):
    """The notes after iterations with these lags; None: without the metric."""
    lag = ValueLag(load_config([], list(overrides)))
    return [lag.note({} if x is None else {"reval/value_lag": x}) for x in lags]


def test_a_lag_is_said_once_after_some_iterations_in_a_row():
    high = LAG + 1.04
    said = watch([high] * (ITERATIONS - 1) + [LAG] + [high] * 4 * ITERATIONS)
    assert [i for i, text in enumerate(said) if text is not None] == [2 * ITERATIONS - 1]
    assert "V(s_1) is 3.0 nats below its target" in said[2 * ITERATIONS - 1]
    assert watch([None, LAG, -9.0] * ITERATIONS) == [None] * 3 * ITERATIONS


@pytest.mark.parametrize(("every", "says"), [(0, True), (1, False), (ITERATIONS, False), (ITERATIONS + 1, True)])
def test_a_reference_that_is_reset_soon_may_lag(every, says):
    assert any(watch([99.0] * ITERATIONS, f"reference.reset_every={every}")) == says


def test_a_value_without_a_gradient_may_lag():
    assert not any(watch([99.0] * ITERATIONS, "objective.value_gradient=false"))


PUSHED_AGAIN = ["replay.updates_per_iteration=3", "reward.shaping=normalized", "reference.reset_every=1"]


@pytest.mark.parametrize("shaping", ["normalized", "centered", "batch_normalized", "plus_minus_one"])
def test_wrong_responses_that_are_pushed_again_are_said(shaping):
    [text] = at_start(load_config([], [*PUSHED_AGAIN, f"reward.shaping={shaping}"]))
    assert text.startswith(f"replay.updates_per_iteration=3 with reward.shaping={shaping} and ")
    assert "objective.taper=true" in text


@pytest.mark.parametrize(
    "other",
    [
        "replay.updates_per_iteration=2",
        "reward.shaping=plain",
        "reference.reset_every=2",
        "objective.taper=true",
        "objective.name=grpo",
    ],
)
def test_other_settings_are_not_said(other):
    assert at_start(load_config([], [*PUSHED_AGAIN, other])) == []


def test_a_run_shows_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reval.training_run.at_start", lambda config: ["said at the start"])
    monkeypatch.setattr("reval.advice.ITERATIONS", 1)
    monkeypatch.setattr("reval.advice.LAG", -99.0)
    settings = [
        f"run.dir={tmp_path}",
        "run.display=plain",
        "run.iterations=2",
        "evaluation.every=0",
        "reward.workers=1",
    ]
    train(load_config(["configs/tiny.yaml"], settings))
    lines = capsys.readouterr().out.splitlines()
    first, second = (next(i for i, line in enumerate(lines) if line.startswith(f"{n}/2 |")) for n in (1, 2))
    assert lines.index("said at the start") < first
    assert [i for i, line in enumerate(lines) if line.startswith("V(s_1) is ")] == [first + 1] and second > first + 1


def test_only_reval_logs_the_lag():
    assert "reval/value_lag" in TRAINING
    check_best_metric(load_config([], ["run.best_metric=reval/value_lag"]), [])
    with pytest.raises(ValueError, match="run.best_metric must be a metric that the run logs"):
        check_best_metric(load_config([], ["run.best_metric=reval/value_lag", "objective.name=tbrm"]), [])
