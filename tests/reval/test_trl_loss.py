"""objective.name=grpo has the loss and the gradient of TRL's GRPOTrainer on the same rollouts: GRPO, DAPO and Dr. GRPO.

Both get the same weights, trajectories of two turns (TRL: `tool_mask`), advantages, and behaviour log-probs
(`old_per_token_logps`). TRL computes the loss of one padded batch, ours is a whole update in micro-batches of any size.

What differs on purpose is before the loss: the advantages. TRL's scale_rewards="group" divides by the sample deviation
(G - 1 in its denominator) plus 1e-4, reward.shaping=normalized by the population deviation. So ours are larger by
sqrt(G / (G - 1)), 1.07 for 8 responses, which AdamW and the clipping of the gradient's norm remove again.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import gradients
from packaging.version import Version

from reval.config import ObjectiveConfig, OptimConfig, ReferenceConfig, ReplayConfig
from reval.learner import Learner
from reval.model.loading import load_model
from reval.reference_policy import ReferencePolicy

trl = pytest.importorskip("trl", reason="the extra `trl` has TRL, whose GRPO this test compares with ours")
if Version(importlib.metadata.version("trl")) < Version("1.16"):
    pytest.skip("TRL before 1.16 has another private interface", allow_module_level=True)

LONGEST = 20
LOSSES = {"grpo": "response", "dapo": "token", "dr_grpo": "constant"}  # loss_type of TRL: objective.normalization


@pytest.fixture
def rollouts(tiny_config, trajectories):
    """Six trajectories of two turns. The rewards are the advantages. Ratios to the behaviour policy are exp(-0.5) to
    exp(0.5), on both sides of the clip."""
    members, rng = trajectories(6, turns=2), np.random.default_rng(2)
    config = replace(tiny_config, reference=ReferenceConfig(reset_every=1))
    ReferencePolicy(load_model(config.model, seed=0)[0], config).annotate(members)
    for t, advantage in zip(members, [1.3, -0.4, 0.2, -1.1, 0.7, -0.6], strict=True):
        t.reward = advantage
        t.behavior += rng.uniform(-0.5, 0.5, len(t.behavior)).astype(np.float32)
    return members


def theirs(folder, model_config, members, loss_type, behavior):
    """TRL's loss and gradients, by the names of the weights."""
    from datasets import Dataset

    model, tokenizer = load_model(model_config, seed=0)
    settings = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(members),
        num_generations=3,
        max_completion_length=LONGEST,
        loss_type=loss_type,
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * len(members)}),
        processing_class=tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # the training loop would set it
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, padded(members, behavior))
    loss.backward()
    return loss.item(), gradients(model)


def padded(members, behavior):
    """The trajectories as TRL's batch: prompts are padded on the left, completions on the right."""
    starts = [int(t.action_mask.argmax()) for t in members]
    before, after = max(starts), max(len(t.token_ids) - start for t, start in zip(members, starts, strict=True))
    prompts, completions = np.zeros((2, len(members), before), int), np.zeros((3, len(members), after), int)
    old = np.zeros((len(members), after), np.float32)
    for i, (t, start) in enumerate(zip(members, starts, strict=True)):
        prompts[:, i, before - start :] = t.token_ids[:start], np.ones(start)
        rest = slice(0, len(t.token_ids) - start)
        completions[:, i, rest] = t.token_ids[start:], np.ones(rest.stop), t.action_mask[start:]
        old[i, rest][t.action_mask[start:]] = t.behavior
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    batch = dict(zip(names, map(torch.from_numpy, (*prompts, *completions)), strict=True))
    batch["advantages"] = torch.tensor([t.reward for t in members])
    batch["num_items_in_batch"] = batch["tool_mask"].sum()
    return batch | ({"old_per_token_logps": torch.from_numpy(old)} if behavior else {})


def ours(tiny_config, members, normalization, tokens):
    """Loss and gradients of one update, by the names of the weights."""
    config = replace(
        tiny_config,
        objective=ObjectiveConfig(name="grpo", normalization=normalization, clip_low=0.2, clip_high=0.28),
        optim=OptimConfig(micro_batch_tokens=tokens, max_grad_norm=float("inf")),
        rollout=replace(tiny_config.rollout, max_new_tokens=LONGEST),
        replay=ReplayConfig(updates_per_iteration=1),
        reference=ReferenceConfig(reset_every=0),
    )
    model, _ = load_model(config.model, seed=0)
    ReferencePolicy(model, config).annotate(members)
    learner, found = Learner(model, config), {}
    learner.optimizer.step = lambda: found.update(gradients(model))
    return learner.update(members)["loss"], found


@pytest.mark.parametrize("behavior", [True, False], ids=["ratio", "ratio 1"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_and_gradient_are_trls(tmp_path, tiny_config, rollouts, loss_type, behavior):
    loss, expected = theirs(tmp_path, tiny_config.model, rollouts, loss_type, behavior)
    if not behavior:
        for t in rollouts:
            t.behavior = None
    for tokens in (1, 10_000):
        found, got = ours(tiny_config, rollouts, LOSSES[loss_type], tokens)
        assert found == pytest.approx(loss, rel=1e-5, abs=1e-7)
        assert got.keys() == expected.keys()
        whole = torch.stack([g.norm() for g in expected.values()]).norm()
        for name, gradient in expected.items():
            assert (got[name] - gradient).norm() < 1e-4 * gradient.norm() + 1e-5 * whole, name
