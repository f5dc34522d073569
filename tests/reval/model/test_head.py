"""The output head: each transformation of the logits is either applied exactly or refused, and the error names it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from reval.batching import Form, collate
from reval.config import ModelConfig
from reval.model.forward import hidden_states
from reval.model.head import OutputHead, check_head, head_of
from reval_kernels import linear_token_values, token_values

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MODELS = {
    "plain": LlamaConfig(**SMALL),
    "softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5),
    "multiplied": CohereConfig(**SMALL, logit_scale=0.0625),
    "divided": GraniteConfig(**SMALL, logits_scaling=8.0),
}


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", MODELS)
def test_values_from_the_head_equal_values_from_the_models_logits(name, trajectories):
    model = make(MODELS[name])
    check_head(model)
    members = trajectories(5, vocabulary=50)
    head, batch = head_of(model), collate(members, model.device, Form.PADDED)
    with torch.no_grad():
        rows = []
        for t in members:  # one trajectory at a time, so that there is no padding
            ids = torch.from_numpy(t.token_ids).long()[None]
            rows.append(model(input_ids=ids).logits[0, :-1][torch.from_numpy(t.action_mask[1:])])
        expected = token_values(torch.cat(rows), batch.actions)
        hidden = hidden_states(model, batch, ModelConfig())
        got = linear_token_values(hidden, actions=batch.actions, **head._asdict())
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if name != "plain":
        assert head != OutputHead(head.weight, None, None, 1.0)


def test_a_bias_is_applied():
    model = make(MODELS["plain"])
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50))
    check_head(model)
    assert head_of(model).bias is model.lm_head.bias


def test_an_unknown_transformation_of_the_logits_is_refused():
    model = make(MODELS["plain"])
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.1)
    with pytest.raises(ValueError, match="does more to its logits than bias, final_logit_softcapping, logit_scale"):
        check_head(model)


def test_a_lora_head_is_refused_by_name():
    model = make(MODELS["plain"])
    model.lm_head.base_layer = torch.nn.Linear(32, 50)
    with pytest.raises(ValueError, match="head of LlamaForCausalLM is adapted by LoRA"):
        head_of(model)


def test_softcap_and_scale_together_are_refused():
    model = make(MODELS["softcap"])
    model.config.logit_scale = 2.0
    with pytest.raises(ValueError, match="both final_logit_softcapping and a logit scale"):
        head_of(model)
