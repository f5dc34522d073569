"""Which forms a model can compute. What it cannot is found by looking, and every form gives the same update.

Tiny random models of families that mix tokens in different ways: plain attention, sliding windows in the mask alone or
as an argument too, softcaps, sinks, attention in chunks, positions that are counted, biases by distance, recurrence.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import gradients
from made import random_trajectories

from reval.batching import Form, collate
from reval.config import ConfigError, ModelConfig, OptimConfig
from reval.distributed import World
from reval.model import packing
from reval.model.forward import hidden_states
from reval.model.loading import load_model
from reval.model.packing import Packing, form_for, packing_of, plan_for

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
BLOOM = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
ALWAYS = sys.maxsize
MODELS = {
    "Llama": (GROUPED, ALWAYS, ""),
    "Qwen2": (GROUPED, ALWAYS, ""),
    "Qwen3": (GROUPED | {"head_dim": 8}, ALWAYS, ""),
    "Qwen3Moe": (GROUPED | {"head_dim": 8} | MIXTURE, ALWAYS, ""),
    "GPTNeoX": (SMALL, ALWAYS, ""),
    "Granite": (GROUPED, ALWAYS, ""),
    "Mistral": (GROUPED | {"sliding_window": 7}, 7, ""),
    "Gemma3Text": (GROUPED | {"head_dim": 8, "sliding_window": 16}, 16, ""),
    "Gemma2": (GROUPED | {"head_dim": 8}, 0, "softcap=50"),
    "GptOss": (GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, 0, "s_aux"),
    "Bloom": (BLOOM, 0, "tokens depend on more"),
    "Mamba": ({"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}, 0, "its own attention masks"),
    "Qwen3Next": (GROUPED | {"head_dim": 8} | MIXTURE | LINEAR, 0, "tokens depend on more"),
}


def make(name: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_can_compute_is_found(name, tiny_config):
    """The hidden states of a batch in the form that the model gets equal those of each trajectory alone."""
    _, longest, reason = MODELS[name]
    model = make(name)
    assert packing_of(model).longest == longest and reason in packing_of(model).reason
    assert bool(reason) == (longest == 0)
    config = replace(tiny_config, optim=OptimConfig(micro_batch_tokens=60))
    members = [*random_trajectories(9, turns=2, vocabulary=50)]
    members += random_trajectories(3, vocabulary=50)
    for chosen in (members, [t for t in members if len(t) <= 8]):
        expected = [hidden_states(model, collate([t], model.device, Form.PADDED), config.model) for t in chosen]
        micros = plan_for(model, chosen, World(), config)
        for micro in micros:
            assert (micro.batch.tree is None) == (max(map(len, chosen)) - 1 > longest)
            got = hidden_states(model, micro.batch, config.model)
            torch.testing.assert_close(got, torch.cat([expected[i] for i in micro.indices]), rtol=1e-4, atol=1e-5)


def test_flash_attention_gets_the_trajectories_one_after_the_other(tiny, tiny_config):
    model, _ = tiny
    flash = replace(tiny_config, model=replace(tiny_config.model, attn_implementation="flash_attention_2"))
    assert form_for(model, 10, flash) is Form.JOINED
    model.reval_packing = Packing(0, False, "recurrent")
    assert form_for(model, 10, flash) is Form.PADDED
    other = replace(tiny_config, model=replace(tiny_config.model, attn_implementation="sage"))
    assert form_for(model, 10, other) is Form.PADDED


def test_packing_that_is_not_possible_is_refused_with_the_reason(tiny_config):
    packed = replace(tiny_config, optim=OptimConfig(packing="packed"))
    with pytest.raises(ConfigError, match=r"Gemma2ForCausalLM: its attention has softcap=50.*Set auto or padded"):
        form_for(make("Gemma2"), 10, packed)
    with pytest.raises(ConfigError, match="at most 7 tokens of a trajectory, and one has 10"):
        form_for(make("Mistral"), 10, packed)
    assert form_for(make("Mistral"), 7, packed) is Form.TREE
    other = replace(packed, model=replace(tiny_config.model, attn_implementation="sage"))
    with pytest.raises(ConfigError, match="model.attn_implementation is sage"):
        form_for(make("Llama"), 10, other)
    assert form_for(make("Llama"), 10, replace(tiny_config, optim=OptimConfig(packing="padded"))) is Form.PADDED


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_form_gives_the_same_hidden_states_and_gradients(tiny_config, attention):
    """The hook counts the tokens that pass the transformer: a tree computes each only once, and none of padding."""
    model, _ = load_model(tiny_config.model, seed=0)
    model.set_attn_implementation(attention)
    members = [*random_trajectories(4, turns=2), *random_trajectories(2, seed=1)]
    members += [replace(t, token_ids=[*t.token_ids[:-1], 7]) for t in members[:3]]
    forms = [Form.PADDED, Form.JOINED, Form.TREE]
    counted, found, hidden = [], [], []
    weights = torch.randn(len(collate(members, model.device).states), 64)
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for form in forms:
        model.zero_grad()
        out = hidden_states(model, collate(members, model.device, form), ModelConfig())
        (out * weights).sum().backward()
        hidden.append(out.detach())
        found.append(gradients(model))
    hook.remove()
    single = sum(len(t) - 1 for t in members)
    assert counted[0] > counted[1] == single and counted[2] == single - sum(len(t) - 1 for t in members[:3])
    for states, gradient in zip(hidden[1:], found[1:], strict=True):
        torch.testing.assert_close(states, hidden[0], rtol=1e-4, atol=1e-5)
        for name, expected in found[0].items():
            assert (gradient[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize("form", [Form.JOINED, Form.TREE])
def test_a_model_that_raises_while_it_is_looked_at_is_padded(monkeypatch, form):
    """A model of a kind that nobody knows must load, and train with padding."""
    real = packing._hidden

    def hidden(model, members, asked):
        if asked is form:
            raise RuntimeError("no rows like these")
        return real(model, members, asked)

    monkeypatch.setattr(packing, "_hidden", hidden)
    model, _ = load_model(ModelConfig(name="tiny"))
    found = packing_of(model)
    if form is Form.TREE:
        assert found == Packing(0, found.joined, "no rows like these")
    else:
        assert not found.joined and found.longest == ALWAYS
