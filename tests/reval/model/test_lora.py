"""LoRA adapters. The reference is first the model without adapters and, after a reset, a copy of the adapters. Merged
weights compute the same logits as the adapted model."""

from dataclasses import replace

import pytest
import torch

from reval.config import LoraConfig, OptimConfig
from reval.learner import Learner
from reval.model.loading import load_model
from reval.model.lora import load_adapters, save_adapters
from reval.model.saving import whole_weights
from reval.reference_policy import ReferencePolicy

IDS = torch.arange(6, 30)[None]


@pytest.fixture
def config(tiny_config):
    return replace(tiny_config, lora=LoraConfig(rank=4), optim=OptimConfig(lr=1e-2))


def trained(config, trajectories):
    model, _ = load_model(config.model, 0, config.lora)
    reference, learner = ReferencePolicy(model, config), Learner(model, config)
    members = trajectories(6)
    reference.annotate(members)
    learner.update(members)
    learner.update(members)
    return model, reference, learner, members


def known(members):
    return [(t.reference["v"], t.reference["log_prob"]) for t in members]


def test_the_reference_is_the_model_without_adapters(config, tiny_config, trajectories):
    model, reference, _, members = trained(config, trajectories)
    plain = trajectories(6)
    ReferencePolicy(load_model(tiny_config.model, 0)[0], tiny_config).annotate(plain)
    for t in members:
        t.reference = {}
    reference.annotate(members)
    assert known(members) == known(plain)
    assert reference.model is None, "no second copy of the weights"
    moved = [p for p in model.parameters() if p.requires_grad]
    assert moved and sum(p.numel() for p in moved) < 0.3 * sum(p.numel() for p in model.parameters())


def test_a_reset_copies_the_adapters(config, trajectories):
    model, reference, learner, members = trained(config, trajectories)
    reference.reset()
    reference.annotate(members)
    before = known(members)
    for t in members:
        t.reward = 0.0
    assert learner.update(members)["loss"] < 1e-6, "the policy is its reference"
    learner.update(members)
    for t in members:
        t.reference = {}
    reference.annotate(members)
    assert known(members) == before, "the policy moved, the copy did not"
    assert all(p.requires_grad == ("lora_" in n and ".policy." in n) for n, p in model.named_parameters())


def test_merged_weights_compute_what_the_adapted_model_does(config, tiny_config, trajectories):
    model, *_ = trained(config, trajectories)
    plain, _ = load_model(tiny_config.model, 1)
    names = set(plain.state_dict()) - {"lm_head.weight"}
    merged = dict(whole_weights(model))
    assert set(merged) == names
    plain.load_state_dict(merged | {"lm_head.weight": merged["model.embed_tokens.weight"]})
    with torch.no_grad():
        merged_logits, adapted_logits = plain(IDS).logits, model(IDS).logits
        base = load_model(tiny_config.model, 0)[0](IDS).logits
    torch.testing.assert_close(merged_logits, adapted_logits, rtol=1e-4, atol=1e-4)
    assert (adapted_logits - base).abs().max() > 1e-2, "training moved the model"


def test_saved_adapters_load_and_other_shapes_are_refused(config, trajectories, tmp_path):
    model, *_ = trained(config, trajectories)
    save_adapters(model, tmp_path, write=True)
    again, _ = load_model(config.model, 0, config.lora, checkpoint=tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    other, _ = load_model(config.model, 0, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="not those that lora.rank and lora.targets ask for"):
        load_adapters(other, tmp_path)


@pytest.mark.parametrize("targets", ["lm_head", "q_proj, lm_head"])
def test_an_adapted_head_is_refused_by_name(tiny_config, targets):
    with pytest.raises(ValueError, match="must not name the head .'lm_head'."):
        load_model(tiny_config.model, 0, LoraConfig(rank=4, targets=targets))


def test_targets_that_do_not_exist_are_refused(tiny_config):
    with pytest.raises(ValueError, match="nothing_like_it"):
        load_model(tiny_config.model, 0, LoraConfig(rank=4, targets="nothing_like_it"))
