"""The table of shapes against transformers and the model cards, and models with random weights of these shapes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from subprocess import run

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from reval.cli import main
from reval.config import ConfigError, ModelConfig, load_config
from reval.model.builtin import SPECIAL, _fill, config_of
from reval.model.loading import load_model
from reval.model.shapes import SHAPES, check_random, named_shape, shape_of
from reval.sources import check_files

ROOT = Path(__file__).parents[3]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 300}


def test_parameters_as_on_the_model_cards():
    """(all, without the embedding) in units of 10^9, rounded as the model cards round them."""
    cards = {
        "Qwen2.5-0.5B": (0.49, 0.36),
        "Qwen2.5-1.5B": (1.54, 1.31),
        "Qwen2.5-3B": (3.09, 2.77),
        "Qwen2.5-7B": (7.61, 6.53),
        "Qwen2.5-14B": (14.7, 13.1),
        "Qwen2.5-32B": (32.5, 31.0),
        "Qwen3-0.6B": (0.6, 0.44),
        "Qwen3-1.7B": (1.7, 1.4),
        "Qwen3-4B": (4.0, 3.6),
        "Qwen3-8B": (8.2, 6.95),
    }
    for name, (whole, layers) in cards.items():
        shape = named_shape(name)
        assert shape.parameters / 1e9 == pytest.approx(whole, rel=0.02), name
        assert shape.layers * shape.layer / 1e9 == pytest.approx(layers, rel=0.03), name
    exact = {"Llama-3.1-8B": 8030261248, "Llama-3.2-1B": 1235814400, "Llama-3.2-3B": 3212749824}
    assert {name: named_shape(name).parameters for name in exact} == exact


def test_a_name_may_lack_its_organisation_and_end_in_instruct():
    full = SHAPES["Qwen/Qwen2.5-1.5B"]
    for name in ("Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct", "random:Qwen2.5-1.5B", "random:Qwen/Qwen2.5-1.5B"):
        check_random(name)
        assert shape_of(name) is full
    assert shape_of("1.5B") is None and shape_of("") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:Qwen2.5-1.5", "got 'random:Qwen2.5-1.5'; did you mean random:Qwen2.5-1.5B?"),
        ("random:qwen/qwen3-8b", "did you mean random:Qwen/Qwen3-8B?"),
        ("random:xyz", "the known shapes are tiny, smollm2"),
        ("random:", "the known shapes are tiny, smollm2"),
        ("random:/no/such", "needs a folder with a config.json; there is no /no/such/config.json"),
    ],
)
def test_a_wrong_name_is_refused_with_the_nearest_one(name, message):
    with pytest.raises(ConfigError, match="model.name: random:") as error:
        check_files(load_config([], [f"model.name={name}"]))
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="random:"):
        load_model(ModelConfig(name=name))


def test_the_table_needs_no_torch():
    program = "import sys, reval.model.shapes; assert not {'torch', 'transformers'} & set(sys.modules)"
    run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_folder_gives_its_shape_and_the_seed_its_weights(kind, tmp_path):
    config = kind(**SMALL, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    torch.manual_seed(5)
    drawn, settings = torch.rand(1), ModelConfig(name=f"random:{tmp_path}")
    torch.manual_seed(5)
    (a, _), (b, _), (c, _) = (load_model(settings, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), drawn), "the global generator is as before"
    assert type(a).config_class is kind and a.lm_head.weight is a.model.embed_tokens.weight and not a.training
    one, same, other = (dict(m.named_parameters()) for m in (a, b, c))
    assert all(torch.equal(w, same[name]) for name, w in one.items())
    matrices = {name: w for name, w in one.items() if w.dim() > 1}
    for name, w in matrices.items():
        assert not torch.equal(w, other[name]), name
        w = w.detach()
        assert w.std().item() == pytest.approx(0.02, rel=0.03), name
        assert abs(w.mean().item()) < 4 * 0.02 / w.numel() ** 0.5, name
    assert not torch.equal(a.model.layers[0].mlp.up_proj.weight, a.model.layers[1].mlp.up_proj.weight)
    assert all((w == (0 if "bias" in name else 1)).all() for name, w in one.items() if w.dim() == 1)
    fresh = kind(**SMALL)
    assert torch.equal(a.model.rotary_emb.inv_freq, type(a)(fresh).model.rotary_emb.inv_freq)
    assert sum(p.numel() for p in a.parameters()) == shape_of(settings.name).parameters


def test_random_weights_are_independent():
    """The largest singular value of an independent n x n matrix is about 2 sqrt(n) deviations, if n is large."""
    weight = torch.empty(512, 512)
    for seed in (0, 1, 7 << 32):
        _fill(weight, seed, 1.0)
        assert weight.abs().max() <= 1 and weight.max() > 0.999 and weight.min() < -0.999
        assert torch.linalg.matrix_norm(weight, 2) / (2 * 512**0.5 * 3**-0.5) == pytest.approx(1, abs=0.03)


def test_weights_are_those_of_the_seed_in_every_dtype(tmp_path):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    full, _ = load_model(ModelConfig(name=f"random:{tmp_path}"), 3)
    half, _ = load_model(ModelConfig(name=f"random:{tmp_path}", dtype="bfloat16"), 3)
    for p, q in zip(full.parameters(), half.parameters(), strict=True):
        assert q.dtype == torch.bfloat16 and torch.equal(p.bfloat16(), q)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_the_tokenizer_has_the_size_of_the_vocabulary(kind, tmp_path):
    kind(**SMALL).save_pretrained(tmp_path)
    model, tokenizer = load_model(ModelConfig(name=f"random:{tmp_path}"))
    assert len(tokenizer) == 300
    for text in ("What is 3 + 4?\n\t<b>~", "π ≤ 4, 五"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) == len(text.encode())
    assert tokenizer.decode([tokenizer("a")["input_ids"][0], 299]) == "a<299>"
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == SPECIAL.index("<|end|>")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|user|>hi<|end|><|assistant|>" and len(ids) == 5
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    again, other = load_model(ModelConfig(name=str(tmp_path / "saved")))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert len(other) == 300 and other.eos_token_id == tokenizer.eos_token_id
    for text in ("a<b  c\n\nd's 12", "π ≤ 4"):
        assert other(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert other.decode([5, 299]) == tokenizer.decode([5, 299])


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    LlamaConfig(**SMALL | {"vocab_size": 260}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a vocabulary of at least 261 tokens; this shape has 260"):
        load_model(ModelConfig(name=f"random:{tmp_path}"))


def test_every_named_shape_is_that_of_its_class():
    for shape in SHAPES.values():
        config = config_of(shape)
        assert config.max_position_embeddings == shape.context > 0
        assert (config.head_dim, config.vocab_size) == (shape.head_dim, shape.vocabulary)


@pytest.mark.slow
def test_the_paper_s_run_trains_resumes_and_evaluates_offline(tmp_path):
    """The settings are those of docs/scale.md, and a small shape, short responses and few prompts."""
    text = (ROOT / "docs/scale.md").read_text()
    [line] = re.findall(r"^reval (train configs/paper_1.5b.yaml model.name=random:(?:.*\\\n)*.*)", text, re.MULTILINE)
    words = line.replace("\\\n", " ").replace("Qwen2.5-1.5B", str(ROOT / "tests/reval/shape")).split()
    small = ["rollout.prompts=2", "rollout.responses=2", "rollout.max_new_tokens=8", "reward.workers=1"]
    small += [f"run.dir={tmp_path / 'run'}", "model.device=cpu", "run.save_every=1", "rollout.dtype=float32"]
    small += ["model.compute_dtype=float32"]
    for iterations in (1, 2):  # the second run resumes the first: run.resume=auto
        assert main([*words, *small, f"run.iterations={iterations}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if "loss" in row] == [1, 2]
    _, tokenizer = load_model(ModelConfig(name=str(tmp_path / "run/checkpoint")))
    assert len(tokenizer) == 300
    assert main(["evaluate", str(tmp_path / "run"), "data.held_out=1", "evaluation.samples=1", "evaluation.k=[1]"]) == 0
