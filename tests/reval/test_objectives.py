"""Each objective equals its formula in docs/method.md section 4, loss and gradient. The formulas are written out here
once more, in float64, on the logits of a forward pass of one trajectory at a time without padding.

Each trajectory has two turns. The behaviour log-probs differ from the policy's by up to 0.5 a token, so ratios lie on
both sides of the clip; two trajectories have none.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reval.batching import collate
from reval.config import ConfigError, ObjectiveConfig, ReferenceConfig, load_config
from reval.learner import Learner
from reval.loop import train
from reval.model.forward import hidden_states, token_values
from reval.model.loading import load_model
from reval.objectives import FUSED, Reference, Totals
from reval.policy_gradients import FROM_VALUES, value_objective
from reval.reference_policy import ReferencePolicy, reference_of
from reval_kernels.hf import head_of

BETA = 0.3
TOTALS = Totals(trajectories=7, actions=61, longest=32)
"""The whole batch: more than the five trajectories of the micro-batch."""
LOG_Z = [0.7, 0.7, -1.1, 0.4, -1.1]


@pytest.fixture
def case(tiny, tiny_config, trajectories):
    """A policy, trajectories that a different reference has annotated at token level, and both models in float64."""
    config = replace(tiny_config, objective=ObjectiveConfig(level="token", beta=BETA))
    model, _ = tiny
    reference = ReferencePolicy(load_model(config.model, seed=9)[0], config)
    members, rng = trajectories(5, turns=2), np.random.default_rng(1)
    reference.annotate(members)
    exact = [copy.deepcopy(x).double() for x in (model, reference.model)]
    for t in members[:3]:
        log_pi = by_hand(exact[0], t)[2].detach().numpy()
        t.behavior = (log_pi + rng.uniform(-0.5, 0.5, len(log_pi))).astype(np.float32)
    batch = collate(members, model.device)
    known = reference_of(members, batch)._replace(log_z=torch.tensor(LOG_Z))
    return model, batch, known, exact, members


def by_hand(model, t):
    """q, v and log pi of the actions of trajectory `t`: float64 [H], H actions, from a forward pass without padding."""
    ids, mask = torch.from_numpy(t.token_ids).long(), torch.from_numpy(t.action_mask)[1:]
    logits = model(input_ids=ids[None]).logits[0, :-1][mask]
    q = logits.gather(-1, ids[1:][mask][:, None])[:, 0]
    v = logits.logsumexp(-1)
    return q, v, q - v


def output_of(model, batch, reference, model_config, config):
    """The objective's output for a micro-batch of the batch that TOTALS describes."""
    if config.name in FUSED:
        hidden = hidden_states(model, batch, model_config)
        return FUSED[config.name](hidden, head_of(model), batch, reference, config, TOTALS)
    values = token_values(model, batch, model_config)
    return value_objective(config.name)(values, batch, reference, config, TOTALS)


def bellman(level, values, known, outcome, value_gradient=True):
    """The squared TD errors of one trajectory, from (q, v, log pi) of the policy and of the reference."""
    (q, v, log_pi), (q_ref, v_ref, log_ref) = values, known
    v_next, v_ref_next = (torch.cat([x[1:], x.new_zeros(1)]) for x in (v, v_ref))
    error = q - (q_ref - v_ref_next + v_next)
    error[-1] -= outcome
    if not value_gradient:
        error[0] -= v[0] - v[0].detach()
    residual = v[0] - v_ref[0] + (log_pi - log_ref).sum() - outcome
    assert error.sum().item() == pytest.approx(residual.item())
    if level == "trajectory":
        return error.sum() ** 2
    return (error**2).sum() if level == "token" else (error.flip(0).cumsum(0) ** 2).sum()


def taper(config, log_pi, t):
    """The weight of objective.taper, a number."""
    if not config.taper or t.behavior is None:
        return 1.0
    ratio = math.exp(log_pi.sum().item() - t.behavior.astype(np.float64).sum())
    return min(1.0, ratio) if t.reward < 0 else 1.0


def clipped(ratio, low, high):
    """A clip that says what it does to the gradient: outside [low, high] the number is a constant."""
    return torch.stack([w if low <= w <= high else w.new_tensor(min(max(w.item(), low), high)) for w in ratio])


def policy_gradient(config, log_pi, t):
    """The loss of one trajectory, times the number of trajectories of the batch."""
    mu = log_pi.detach() if t.behavior is None else torch.from_numpy(t.behavior).double()
    ratio, low, high = (log_pi - mu).exp(), 1 - config.clip_low, 1 + config.clip_high
    if config.name == "topr":
        weight = 1.0 if t.reward >= 0 else min(1.0, ratio.prod().item())
        return -weight * t.reward * log_pi.sum()
    if config.name == "asymre":
        return -(t.reward + config.baseline_shift) * log_pi.sum()
    if config.name == "kimi":
        terms = -clipped(ratio, low, high) * t.reward + config.beta * (log_pi - mu) ** 2
        return terms.sum() / TOTALS.actions * TOTALS.trajectories
    terms = -torch.minimum(ratio * t.reward, clipped(ratio, low, high) * t.reward)
    share = {"response": 1 / len(terms), "token": TOTALS.trajectories / TOTALS.actions, "constant": 1 / TOTALS.longest}
    return terms.sum() * share[config.normalization]


def expected(config, model, reference, members):
    """The loss by its formula, differentiable."""
    terms = []
    for i, t in enumerate(members):
        values = by_hand(model, t)
        with torch.no_grad():
            known = by_hand(reference, t)
        outcome, d = t.reward / BETA, (values[2] - known[2]).sum()
        if config.name == "reval":
            terms.append(
                taper(config, values[2], t) * bellman(config.level, values, known, outcome, config.value_gradient)
            )
        elif config.name in ("tbrm", "regression", "tba"):
            terms.append((d - outcome + {"tbrm": values[1][0], "regression": 0.0, "tba": LOG_Z[i]}[config.name]) ** 2)
        else:
            terms.append(policy_gradient(config, values[2], t))
    return torch.stack(terms).sum() / TOTALS.trajectories


def gradients(model, loss):
    """The gradient by the weights, as one vector of float64."""
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


CASES = [
    {"name": "reval", "level": "trajectory"},
    {"name": "reval", "level": "token"},
    {"name": "reval", "level": "subtrajectory"},
    {"name": "reval", "taper": True},
    {"name": "reval", "value_gradient": False},
    {"name": "reval", "value_gradient": False, "taper": True},
    {"name": "tbrm"},
    {"name": "regression"},
    {"name": "tba"},
    {"name": "grpo"},
    {"name": "grpo", "normalization": "token", "clip_low": 0.1, "clip_high": 0.05},
    {"name": "grpo", "normalization": "constant", "clip_low": float("inf"), "clip_high": float("inf")},
    {"name": "topr"},
    {"name": "asymre", "baseline_shift": 0.4},
    {"name": "kimi"},
]


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: " ".join(map(str, settings.values())))
def test_loss_and_gradient_are_the_formula(case, tiny_config, settings):
    model, batch, reference, exact, members = case
    config = ObjectiveConfig(beta=BETA, **settings)
    out = output_of(model, batch, reference, tiny_config.model, config)
    assert not any(x.requires_grad for x in out[1:]), "the metrics would keep the graph alive"
    loss = expected(config, *exact, members)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
    ours, truth = gradients(model, out.loss), gradients(exact[0], loss)
    assert (ours - truth).norm() < 1e-4 * truth.norm() and truth.norm() > 1e-3


@pytest.mark.parametrize("name", [*FUSED, *FROM_VALUES])
def test_residual_terms_add_up(case, tiny_config, name):
    model, batch, reference, exact, members = case
    config = ObjectiveConfig(name=name, beta=BETA)
    out = output_of(model, batch, reference, tiny_config.model, config)
    with torch.no_grad():
        for row, t in enumerate(members):
            (_, v, log_pi), (_, v_ref, log_ref) = (by_hand(one, t) for one in exact)
            assert out.v[row].item() == pytest.approx(v[0].item(), rel=1e-5)
            assert reference.v[row].item() == pytest.approx(v_ref[0].item(), rel=1e-5)
            assert out.log_ratio[row].item() == pytest.approx((log_pi - log_ref).sum().item(), abs=1e-4)


# ---- The ratio and its clip, on one action whose numbers can be checked by eye ----


class OneAction:
    """A batch of one action and its token values. `ratio` is pi / mu; None: mu is not known."""

    def __init__(self, ratio, reward):
        self.log_prob = torch.tensor([[-1.0]], requires_grad=True)
        self.v = torch.zeros(1, 1)
        self.behavior = torch.tensor([[math.nan if ratio is None else -1.0 - math.log(ratio)]])
        self.rewards, self.mask = torch.tensor([reward]), torch.tensor([[True]])

    def loss_and_gradient(self, **settings):
        """The loss, and its derivative by log pi."""
        known, config = Reference(*torch.zeros(3, 1)), ObjectiveConfig(**settings)
        out = FROM_VALUES[config.name](self, self, known, config, Totals(1, 1, 1))
        out.loss.backward()
        return out.loss.item(), self.log_prob.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (None, 2.0, -2.0, -2.0),  # the ratio is 1 and only carries the gradient
        (1.0, -2.0, 2.0, 2.0),
        (1.2, 2.0, -2.4, -2.4),
        (1.5, 2.0, -2.56, 0.0),  # above 1 + clip_high: pushed up far enough
        (1.5, -2.0, 3.0, 3.0),  # above it with A < 0: not clipped
        (0.5, -2.0, 1.6, 0.0),  # below 1 - clip_low: pushed down far enough
        (0.5, 2.0, -1.0, -1.0),  # below it with A > 0: not clipped
    ],
)
def test_grpo_clips_each_side(ratio, advantage, loss, gradient):
    found = OneAction(ratio, advantage).loss_and_gradient(name="grpo", clip_low=0.2, clip_high=0.28)
    assert found == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (None, 2.0, -2.0, -2.0),
        (0.5, 2.0, -1.6 + 0.1 * math.log(2) ** 2, -0.2 * math.log(2)),  # only the penalty has a gradient
        (1.5, -2.0, 2.56 + 0.1 * math.log(1.5) ** 2, 0.2 * math.log(1.5)),  # whatever the sign of A
        (1.2, -2.0, 2.4 + 0.1 * math.log(1.2) ** 2, 2.4 + 0.2 * math.log(1.2)),
    ],
)
def test_kimi_clips_whatever_the_sign_of_the_advantage(ratio, advantage, loss, gradient):
    found = OneAction(ratio, advantage).loss_and_gradient(name="kimi", beta=0.1, clip_low=0.2, clip_high=0.28)
    assert found == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gradient"),
    [(None, -2.0, 2.0), (0.5, 2.0, -2.0), (1.5, 2.0, -2.0), (0.5, -2.0, 1.0), (1.5, -2.0, 2.0)],
)
def test_topr_truncates_the_ratio_of_wrong_responses_only(ratio, advantage, gradient):
    _, found = OneAction(ratio, advantage).loss_and_gradient(name="topr")
    assert found == pytest.approx(gradient, rel=1e-5)


# ---- An objective of the user ----


OWN = """
from reval.policy_gradients import grpo

def scaled(values, batch, reference, config, totals):
    out = grpo(values, batch, reference, config, totals)
    return out._replace(loss=config.options["scale"] * out.loss)
"""


def test_an_objective_from_a_file_trains(tmp_path, tiny_config, trajectories):
    (tmp_path / "losses.py").write_text(OWN)
    found = []
    for settings in ({"name": "grpo"}, {"name": f"{tmp_path}/losses.py:scaled", "options": {"scale": 3}}):
        config = replace(tiny_config, objective=ObjectiveConfig(**settings), reference=ReferenceConfig(reset_every=1))
        model, members = load_model(config.model, seed=0)[0], trajectories(5)
        ReferencePolicy(model, config).annotate(members)
        found.append(Learner(model, config).update(members))
    assert found[1]["loss"] == pytest.approx(3 * found[0]["loss"]) != 0
    assert found[1]["grad_norm"] == pytest.approx(3 * found[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("losses.py:scald", r"objective.name '.*losses.py:scald': 'scald' does not exist .*did you mean 'scaled'\?"),
        ("loses.py:scaled", r"objective.name '.*': there is no file .*loses.py; did you mean 'losses.py'\?"),
    ],
)
def test_an_objective_that_is_not_there_is_named_before_the_model_is_loaded(tmp_path, spec, message):
    (tmp_path / "losses.py").write_text(OWN)
    nowhere = [f"objective.name={tmp_path}/{spec}", f"model.name={tmp_path}/nowhere", f"run.dir={tmp_path}/run"]
    with pytest.raises(ConfigError, match=message):
        train(load_config(["configs/tiny.yaml"], nowhere))
