"""Each cached value of the reference policy equals a newly computed value, or the cache marks the value as stale."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from reval.batching import collate
from reval.config import ObjectiveConfig, OptimConfig
from reval.reference_policy import ReferencePolicy, reference_of


def known(trajectories):
    return [(t.reference["v"], t.reference["log_prob"]) for t in trajectories]


def test_cached_values_do_not_depend_on_the_micro_batches(tiny, tiny_config, trajectories):
    together, alone = trajectories(9), trajectories(9)
    ReferencePolicy(tiny[0], tiny_config).annotate(together)
    small = replace(tiny_config, optim=OptimConfig(micro_batch_tokens=1))
    ReferencePolicy(tiny[0], small).annotate(alone)
    np.testing.assert_allclose(known(together), known(alone), rtol=1e-6, atol=1e-5)


def test_only_missing_or_stale_values_are_computed(tiny, tiny_config, trajectories):
    model, _ = tiny
    reference = ReferencePolicy(model, tiny_config)
    members = trajectories(4)
    assert reference.annotate(members[:3]) == 3
    assert reference.annotate(members) == 1
    before = known(members)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert reference.annotate(members) == 0, "the reference is a copy: the policy may move"
    reference.reset()
    assert reference.version == 1
    assert reference.annotate(members) == 4
    assert not np.allclose(known(members), before)
    fresh = trajectories(4)
    ReferencePolicy(model, tiny_config).annotate(fresh)
    np.testing.assert_array_equal(known(fresh), known(members))


def test_token_values_are_cached_only_for_levels_that_need_them(tiny, tiny_config, trajectories):
    config = replace(tiny_config, objective=ObjectiveConfig(level="subtrajectory"))
    members = trajectories(5, turns=2)
    ReferencePolicy(tiny[0], config).annotate(members)
    batch = collate(members, tiny[0].device)
    reference = reference_of(members, batch)
    assert [t.reference["values"].shape for t in members] == [(int(t.action_mask.sum()), 3) for t in members]
    torch.testing.assert_close(batch.pad(reference.values.log_prob).sum(1), reference.log_prob)
    torch.testing.assert_close(reference.values.v[batch.cu_seqlens[:-1]], reference.v)
    torch.testing.assert_close(reference.v + reference.log_prob, reference.returns)
    other = trajectories(5)
    ReferencePolicy(tiny[0], tiny_config).annotate(other)
    assert "values" not in other[0].reference and reference_of(other, collate(other, tiny[0].device)).values is None


def test_the_reference_takes_no_gradient(tiny, tiny_config):
    reference = ReferencePolicy(tiny[0], tiny_config)
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in tiny[0].parameters())
    assert reference.model.lm_head.weight.data_ptr() != tiny[0].lm_head.weight.data_ptr()
    assert reference.model.lm_head.weight is reference.model.get_input_embeddings().weight, "tied as the policy is"


@pytest.mark.parametrize("level", ["trajectory", "token", "subtrajectory"])
def test_calibrated_start_has_loss_and_gradient_zero(tiny, tiny_config, trajectories, level):
    """The rewards are 0 and the policy equals the reference, so the loss is 0: exactly 0 at token level, and 0 up to
    the rounding of the cached sums at trajectory level."""
    from reval.learner import Learner

    config = replace(tiny_config, objective=ObjectiveConfig(level=level, beta=0.1))
    members = trajectories(6, turns=2)
    for t in members:
        t.reward = 0.0
    ReferencePolicy(tiny[0], config).annotate(members)
    update = Learner(tiny[0], config).update(members)
    if level == "trajectory":
        assert update["loss"] < 1e-9
    else:
        assert update["loss"] == 0.0 and update["grad_norm"] == 0.0


def test_right_after_a_reset_the_loss_depends_only_on_the_rewards(tiny, tiny_config, trajectories):
    from reval.learner import Learner

    members = trajectories(6)
    ReferencePolicy(tiny[0], tiny_config).annotate(members)
    update = Learner(tiny[0], tiny_config).update(members)
    beta = tiny_config.objective.beta
    assert update["loss"] == pytest.approx(np.mean([(t.reward / beta) ** 2 for t in members]), rel=1e-5)
