"""Each objective equals its formula in docs/method.md section 4, computed in float64 from the model's logits. Each
trajectory has two turns."""

from __future__ import annotations

import pytest
import torch

from reval.batching import collate
from reval.config import ObjectiveConfig
from reval.model.forward import hidden_states, token_values
from reval.model.head import head_of
from reval.model.loading import load_model
from reval.objectives import FROM_VALUES, FUSED
from reval.reference_policy import ReferencePolicy, reference_of

BETA = 0.3


@pytest.fixture
def case(tiny, tiny_config, trajectories):
    """A policy, a different reference policy, and trajectories that the reference has annotated at token level."""
    from dataclasses import replace

    config = replace(tiny_config, objective=ObjectiveConfig(level="token", beta=BETA))
    model, _ = tiny
    reference = ReferencePolicy(load_model(config.model, seed=9)[0], config)
    members = trajectories(5, turns=2)
    reference.annotate(members)
    batch = collate(members, model.device)
    return model, reference.model, batch, reference_of(members, batch), members


@torch.no_grad()
def by_hand(model, t):
    """q, v and log pi of the actions of trajectory `t`: float64 [H], H actions, from a forward pass without padding."""
    ids, mask = torch.from_numpy(t.token_ids).long(), torch.from_numpy(t.action_mask)[1:]
    logits = model.double()(input_ids=ids[None]).logits[0, :-1][mask]
    model.float()
    q = logits.gather(-1, ids[1:][mask][:, None])[:, 0]
    v = logits.logsumexp(-1)
    return q, v, q - v


def output_of(model, batch, reference, model_config, config):
    """The objective's output, with 7 as the number of trajectories in the whole batch."""
    if config.name in FUSED:
        hidden = hidden_states(model, batch, model_config)
        return FUSED[config.name](hidden, head_of(model), batch, reference, config, 7)
    return FROM_VALUES[config.name](token_values(model, batch, model_config), batch, reference, config, 7)


def expected(name, level, case):
    model, reference, _, _, members = case
    terms = []
    for t in members:
        (q, v, log_pi), (q_ref, v_ref, log_ref) = by_hand(model, t), by_hand(reference, t)
        outcome = t.reward / BETA
        d = (log_pi - log_ref).sum()
        if name == "grpo":
            terms.append(-t.reward * log_pi.mean())
        elif name == "regression":
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
    [
        ("reval", "trajectory"),
        ("reval", "token"),
        ("reval", "subtrajectory"),
        ("tbrm", "trajectory"),
        ("regression", "trajectory"),
        ("grpo", "trajectory"),
    ],
)
def test_loss_is_the_formula(case, tiny_config, name, level):
    model, _, batch, reference, _ = case
    config = ObjectiveConfig(name=name, level=level, beta=BETA)
    out = output_of(model, batch, reference, tiny_config.model, config)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(expected(name, level, case), rel=1e-5)
    assert not any(x.requires_grad for x in out[1:]), "the metrics would keep the graph alive"
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", [*FUSED, *FROM_VALUES])
def test_residual_terms_add_up(case, tiny_config, name):
    model, reference_model, batch, reference, members = case
    config = ObjectiveConfig(name=name, beta=BETA)
    out = output_of(model, batch, reference, tiny_config.model, config)
    for row, t in enumerate(members):
        (_, v, log_pi), (_, v_ref, log_ref) = by_hand(model, t), by_hand(reference_model, t)
        assert out.v[row].item() == pytest.approx(v[0].item(), rel=1e-5)
        assert reference.v[row].item() == pytest.approx(v_ref[0].item(), rel=1e-5)
        assert out.log_ratio[row].item() == pytest.approx((log_pi - log_ref).sum().item(), abs=1e-4)
