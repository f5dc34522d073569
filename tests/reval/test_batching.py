"""Trajectories to padded tensors and back. Each distinct prompt is stored once and passes the transformer once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from made import random_trajectories

from reval.batching import collate, micro_batches, plan
from reval.config import ModelConfig, OptimConfig
from reval.distributed import World
from reval.model.forward import hidden_states
from reval.model.loading import load_model
from reval.replay import Trajectory

CPU = torch.device("cpu")


def groups(prompts: int, responses: int, seed: int = 0) -> list[Trajectory]:
    """Several responses of unequal lengths to each prompt, in random order. The first prompt is a single token."""
    rng = np.random.default_rng(seed)
    out = []
    for p in range(prompts):
        prompt = rng.integers(6, 100, 1 if p == 0 else rng.integers(2, 9))
        for _ in range(responses):
            ids = np.concatenate([prompt, rng.integers(6, 100, rng.integers(1, 8))])
            mask = np.arange(len(ids)) >= len(prompt)
            out.append(Trajectory(token_ids=ids, action_mask=mask, reward=float(rng.normal()), score=0.0, iteration=1))
    return [out[i] for i in rng.permutation(len(out))]


def test_each_state_is_followed_by_its_action(trajectories):
    for members in (trajectories(6, turns=2), groups(3, 4)):
        batch = collate(members, CPU)
        assert batch.mask[:, 0].all()
        for row, t in enumerate(members):
            prefix = batch.prefixes[batch.prefix_of[row]][batch.prefix_mask[batch.prefix_of[row]].bool()]
            states = batch.states[row][batch.state_mask[row].bool()]
            assert prefix.tolist() + states.tolist() == t.token_ids[:-1].tolist()
            assert batch.actions[row][batch.mask[row]].tolist() == t.token_ids[t.action_mask].tolist()
        assert batch.rewards.tolist() == pytest.approx([t.reward for t in members])
    assert len(batch.prefixes) == 3


@pytest.mark.parametrize("budget", [1, 17, 40, 10_000])
def test_micro_batches_cover_all_once_and_keep_the_budget(budget):
    members = groups(5, 4)
    batches = list(micro_batches(members, OptimConfig(micro_batch_tokens=budget)))
    assert sorted(i for chosen in batches for i in chosen) == list(range(20))
    for chosen in batches:
        batch = collate([members[i] for i in chosen], CPU)
        assert len(chosen) == 1 or batch.prefixes.numel() + batch.states.numel() <= budget


def test_micro_batches_keep_the_responses_to_a_prompt_together():
    members = groups(5, 4)
    batches = micro_batches(members, OptimConfig(micro_batch_tokens=60))
    split = [{members[i].prefix.tobytes() for i in chosen} for chosen in batches]
    assert len(split) > 1 and sum(map(len, split)) < 5 + len(split)


def test_a_shared_prompt_is_computed_once_and_changes_nothing(tiny):
    """Hidden states and gradients equal those of each trajectory alone. The hook counts the tokens that pass the
    transformer."""
    model, _ = tiny
    members = [t for t in groups(4, 5) if len(t.prefix)]
    counted = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    batch = collate(members, CPU)
    weights = torch.randn(*batch.mask.shape, 64)
    together = hidden_states(model, batch, ModelConfig())
    hook.remove()
    assert counted == [batch.prefixes.numel(), batch.states.numel()] and len(batch.prefixes) == 3
    (together * weights * batch.mask[..., None]).sum().backward()
    shared = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row, t in enumerate(members):
        alone = hidden_states(model, collate([t], CPU), ModelConfig())[0]
        n = alone.shape[0]
        torch.testing.assert_close(together[row, :n], alone, rtol=1e-4, atol=1e-5)
        (alone * weights[row, :n] * batch.mask[row, :n, None]).sum().backward()
    for name, p in model.named_parameters():
        assert (shared[name] - p.grad).norm() <= 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_batch_computes_the_same_as_a_padded_one(tiny_config, attention):
    """The same hidden states and gradients. The hook counts the tokens that pass the transformer: a packed batch has no
    padding tokens."""
    model, _ = load_model(tiny_config.model, seed=0)
    model.set_attn_implementation(attention)
    members = [*groups(3, 2), *random_trajectories(4, turns=2)]
    padded, packed = collate(members, CPU, share=False), collate(members, CPU, packed=True)
    assert not padded.share and not packed.share
    weights = torch.randn(*padded.mask.shape, 64) * padded.state_mask[..., None]
    counted, gradients, hidden = [], [], []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for batch in (padded, packed):
        model.zero_grad()
        out = hidden_states(model, batch, ModelConfig())
        (out * weights).sum().backward()
        hidden.append(out.detach() * padded.state_mask[..., None])
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    hook.remove()
    assert counted[1] == sum(len(t) - 1 for t in members) < counted[0]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-5)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_packed_micro_batches_count_tokens_without_padding():
    members = groups(5, 4)
    parts = list(micro_batches(members, OptimConfig(micro_batch_tokens=60, packing=True)))
    assert sorted(i for part in parts for i in part) == list(range(20))
    assert all(sum(len(members[i]) for i in part) <= 60 for part in parts)


def test_processes_share_a_batch_and_keep_in_step(tiny_config):
    """Each trajectory goes to exactly one process, and all processes get about the same number of tokens. A process
    with fewer micro-batches gets padding ones."""
    members, counts = groups(7, 3), []
    config = replace(tiny_config, optim=OptimConfig(micro_batch_tokens=40))

    class One(World):
        def gather(self, item):
            counts.append(item)
            return [*counts, 9]  # another process has 9 micro-batches

    plans = [plan(members, One(rank, 3), CPU, config) for rank in range(3)]
    assert all(len(p) == 9 for p in plans)
    assert sorted(i for p in plans for micro in p for i in micro.indices) == list(range(21))
    tokens = [sum(len(members[i]) for micro in p for i in micro.indices) for p in plans]
    assert max(tokens) < 1.2 * min(tokens)
    for micro in (micro for p in plans for micro in p if len(micro.indices) > 1):
        assert micro.batch.prefixes[micro.batch.prefix_of].numel() + micro.batch.states.numel() <= 40
    padding = [micro for p in plans for micro in p if not micro.indices]
    assert padding and all(len(micro.trajectories) == len(micro.batch.mask) == 1 for micro in padding)
    assert not any(micro.batch.share for p in plans for micro in p), "FSDP computes each prompt with each response"
