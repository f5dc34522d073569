"""Each cached value of the reference policy equals a newly computed value, or the cache marks the value as stale."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from reval.batching import collate
from reval.config import ObjectiveConfig, OptimConfig, ReferenceConfig, load_config
from reval.learner import Learner
from reval.loop import train
from reval.model.forward import token_values
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


@pytest.mark.parametrize("every", [0, 1, 2])
def test_behavior_is_recorded_once_and_only_if_the_reference_is_the_policy(tiny, tiny_config, trajectories, every):
    model, config = tiny[0], replace(tiny_config, reference=ReferenceConfig(reset_every=every))
    reference, members = ReferencePolicy(model, config), trajectories(5, turns=2)
    reference.annotate(members[:3])
    first = [t.behavior for t in members]
    known = [x is not None for x in first]
    assert known == [every == 1] * 3 + [False] * 2
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    reference.reset()
    assert reference.annotate(members) == 5
    for before, t in zip(first, members, strict=True):
        if every != 1:
            assert t.behavior is None
            continue
        assert t.behavior.dtype == np.float32 and len(t.behavior) == t.action_mask.sum()
        assert before is None or t.behavior is before, "the reset changes the reference only"
        after_the_reset = t.behavior.sum() == pytest.approx(t.reference["log_prob"], rel=1e-5)
        assert after_the_reset == (before is None)


def test_behavior_is_the_policy_of_the_first_use(tmp_path, monkeypatch):
    """A whole run of GRPO with replay: ratios are 1 at the first use, and the numbers then stay."""
    seen, moved, update = {}, [], Learner.update

    def watched(self, members, progress=None):
        with torch.no_grad():
            batch = collate(members, self.model.device)
            now = token_values(self.model, batch, config.model).log_prob
        for row, t in zip(now, members, strict=True):
            difference = np.abs(row[: len(t.behavior)].numpy() - t.behavior).max()
            if id(t) in seen:
                assert np.array_equal(t.behavior, seen[id(t)][1])
                moved.append(difference)
            else:
                assert difference < 1e-4
            seen[id(t)] = t, t.behavior.copy()  # the trajectory stays alive, so its id is not used again
        return update(self, members, progress)

    monkeypatch.setattr(Learner, "update", watched)
    settings = [
        *("objective.name=grpo", "reference.reset_every=1", "replay.updates_per_iteration=3", "replay.draw=groups"),
        *("reward.function=tests/reval/rewards_by_length.py:score", "reward.shaping=normalized"),
        *("data.held_out=0", f"run.dir={tmp_path}", "run.display=plain", "tracking.tensorboard=false"),
    ]
    config = load_config(["configs/tiny.yaml"], settings)
    train(config)
    groups = Counter(t.group for t, _ in seen.values())
    assert len(seen) == 48 and set(groups.values()) == {4} and len(groups) == 12, "3 iterations of 4 prompts x 4"
    assert max(moved) > 1e-3


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
    members = trajectories(6)
    ReferencePolicy(tiny[0], tiny_config).annotate(members)
    update = Learner(tiny[0], tiny_config).update(members)
    beta = tiny_config.objective.beta
    assert update["loss"] == pytest.approx(np.mean([(t.reward / beta) ** 2 for t in members]), rel=1e-5)
