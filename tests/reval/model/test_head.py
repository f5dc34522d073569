"""A model whose head the losses cannot compute is refused when it is loaded; the trainer's values are those of the
model's own logits. tests/reval_kernels/test_hf.py tests the head itself."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from reval.batching import Form, collate
from reval.config import ModelConfig
from reval.model import loading
from reval.model.forward import action_values
from reval.model.loading import load_model
from reval_kernels import token_values

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


@pytest.mark.parametrize("form", [Form.PADDED, Form.JOINED])
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_the_models_own_logits(name, form, trajectories):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    members = trajectories(5, vocabulary=50)
    batch = collate(members, model.device, form)
    with torch.no_grad():
        rows = []
        for t in members:  # one trajectory at a time, so that there is no padding
            ids = torch.from_numpy(t.token_ids).long()[None]
            rows.append(model(input_ids=ids).logits[0, :-1][torch.from_numpy(t.action_mask[1:])])
        expected = token_values(torch.cat(rows), batch.actions)
        got = action_values(model, batch, ModelConfig())
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_head_that_does_more_is_refused_when_the_model_is_loaded(monkeypatch, tiny_config):
    made = loading.tiny_model

    def with_hook(seed):
        model, tokenizer = made(seed)
        model.lm_head.register_forward_hook(lambda module, inputs, output: output.clamp(-1, 1))
        return model, tokenizer

    monkeypatch.setattr(loading, "tiny_model", with_hook)
    with pytest.raises(ValueError, match="LlamaForCausalLM does more to its logits than a scale, a softcap"):
        load_model(tiny_config.model)
