"""Objectives against METHOD.md's formulas, written out in float64 from the model's own logits; two turns each."""

from __future__ import annotations

import pytest
import torch

from reval.batching import collate
from reval.config import ObjectiveConfig
from reval.models import head_of, last_hidden, load_model
from reval.objectives import OBJECTIVES, residual_parts
from reval.reference_policy import ReferencePolicy, reference_of

BETA = 0.3


@pytest.fixture
def case(tiny, tiny_config, trajectories):
    """Policy and reference that differ, and trajectories annotated by the reference at token level."""
    from dataclasses import replace

    config = replace(tiny_config, objective=ObjectiveConfig(level="token", beta=BETA))
    model, _ = tiny
    reference = ReferencePolicy(load_model(config.model, seed=9)[0], config)
    members = trajectories(5, turns=2)
    reference.annotate(members)
    batch = collate(members, model.device)
    return model, reference.model, batch, reference_of(members, batch)


@torch.no_grad()
def by_hand(model, batch, row):
    """q, v and log pi of one trajectory's actions in float64, from the model's logits."""
    logits = model.double()(input_ids=batch.token_ids, attention_mask=batch.attention_mask).logits[row, :-1]
    model.float()
    logits = logits[batch.mask[row]]
    q = logits.gather(-1, batch.actions[row][batch.mask[row]][:, None])[:, 0]
    v = logits.logsumexp(-1)
    return q, v, q - v


def expected(name, level, case):
    model, reference, batch, _ = case
    terms = []
    for row in range(len(batch.rewards)):
        (q, v, log_pi), (q_ref, v_ref, log_ref) = by_hand(model, batch, row), by_hand(reference, batch, row)
        outcome = batch.rewards[row].double() / BETA
        d = (log_pi - log_ref).sum()
        if name == "regression":
            terms.append((d - outcome) ** 2)
        elif name == "tbrm":
            terms.append((v[0] + d - outcome) ** 2)
        else:
            v_next, v_ref_next = (torch.cat([x[1:], x.new_zeros(1)]) for x in (v, v_ref))
            error = q - (q_ref - v_ref_next + v_next)
            error[-1] -= outcome
            assert error.sum().item() == pytest.approx((v[0] - v_ref[0] + d - outcome).item())
            terms.append(
                {
                    "trajectory": error.sum() ** 2,
                    "token": (error**2).sum(),
                    "subtrajectory": (error.flip(0).cumsum(0) ** 2).sum(),
                }[level]
            )
    return torch.stack(terms).sum().item() / 7


@pytest.mark.parametrize(
    ("name", "level"),
    [("reval", "trajectory"), ("reval", "token"), ("reval", "subtrajectory"), ("tbrm", "trajectory"),
     ("regression", "trajectory")],
)  # fmt: skip
def test_loss_is_the_formula(case, tiny_config, name, level):
    model, _, batch, reference = case
    config = ObjectiveConfig(name=name, level=level, beta=BETA)
    hidden = last_hidden(model, batch, tiny_config.model)
    out = OBJECTIVES[name](hidden, head_of(model), batch, reference, config, 7)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected(name, level, case), rel=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert not out.residual.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_residual_parts_add_up(case, tiny_config, name):
    model, reference_model, batch, reference = case
    config = ObjectiveConfig(name=name, beta=BETA)
    hidden = last_hidden(model, batch, tiny_config.model)
    residual = OBJECTIVES[name](hidden, head_of(model), batch, reference, config, 7).residual
    parts = residual_parts(hidden, head_of(model), batch, reference, config, residual)
    for row in range(len(batch.rewards)):
        (_, v, log_pi), (_, v_ref, log_ref) = by_hand(model, batch, row), by_hand(reference_model, batch, row)
        assert parts["v_policy"][row].item() == pytest.approx(v[0].item(), rel=1e-5)
        assert parts["v_reference"][row].item() == pytest.approx(v_ref[0].item(), rel=1e-5)
        assert parts["log_ratio"][row].item() == pytest.approx((log_pi - log_ref).sum().item(), abs=1e-4)
