"""The real vLLM engine (`make test-vllm`).

The tests use float32, in which vLLM and transformers agree to 1e-4. A larger difference shows that a weight did not
arrive, that a tied head kept its old copy, or that the prefix cache holds keys and values of old weights. SmolLM2 has a
tied head. The small model has an untied head and a vocabulary of only 102 words, so that the distribution of sampled
words can be checked.

Prompts are longer than a block of the prefix cache (128 tokens on a CPU), because shorter prompts do not use the cache.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reval.config import load_config
from reval.model.loading import load_model
from reval.rollout import RolloutError, make_rollout
from reval.rollout.hf import HFRollout
from reval.rollout.probe import mismatch
from reval.rollout.vllm_worker import SyncExtension

pytest.importorskip("vllm", reason="vllm is not installed here: make test-vllm")

# An engine takes 10 s to start on an idle machine, and a minute on a busy machine.
pytestmark = pytest.mark.timeout(900)

EXACT = 1e-4  # nats; the largest measured difference is 6e-5, and 0.2 with old keys and values
BLOCK = 128


def config(mode, *overrides):
    base = ["rollout.engine=vllm", "rollout.dtype=float32", "rollout.batch_size=64", "rollout.timeout=600"]
    return load_config([], [*base, f"rollout.vllm_mode={mode}", "rollout.vllm_options.max_model_len=512", *overrides])


@pytest.fixture(scope="module")
def smol():
    return load_model(config("server").model)


@pytest.fixture(scope="module", params=["server", "colocated"])
def engine(request, smol):
    engine = make_rollout(config(request.param), *smol)
    with pytest.raises(RolloutError, match="has no weights"):
        engine.generate([[1]], responses=1, max_new_tokens=1, temperature=1.0, seed=0)
    yield engine
    engine.close()


@pytest.fixture
def policy(smol, engine):
    """The model and its tokenizer. The engine has the model's weights. After the test, the weights are restored."""
    model, _ = smol
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    engine.sync(model.state_dict().items())
    yield smol
    model.load_state_dict(before)


@pytest.fixture(scope="module")
def small(tiny_config):
    """A model with an untied head and a head_dim that vLLM's CPU attention supports. The head is multiplied by 8, so
    that some words are much more likely than others."""
    _, tokenizer = load_model(tiny_config.model)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=102,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model.eval(), tokenizer


def prompts(tokenizer):
    """Three prompts of different lengths. Two are longer than a block of the prefix cache and share its content."""
    long = tokenizer("Sums of small numbers. " + " ".join(f"{i} + 1 = {i + 1}." for i in range(40)))
    ids = long["input_ids"][: BLOCK + 20]
    assert len(ids) == BLOCK + 20
    return [ids, ids[:-5], tokenizer("What is 2 + 3?")["input_ids"]]


@torch.no_grad()
def log_probs(model, sequences, starts):
    def one(ids, start):
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 :]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids[start:])[:, None])[:, 0].tolist()

    return [one(ids, start) for ids, start in zip(sequences, starts, strict=True)]


def generated(engine, tokenizer, **settings):
    """Generate responses. Returns (groups, sequences, starts). Their keys and values are then in the prefix cache."""
    asked = prompts(tokenizer)
    groups = engine.generate(asked, **{"responses": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 3} | settings)
    pairs = [(p, r) for p, group in zip(asked, groups, strict=True) for r in group]
    return groups, [p + r.token_ids for p, r in pairs], [len(p) for p, _ in pairs]


def distance(engine, model, sequences, starts):
    """The largest difference that the probe finds, over 3 tokens of every second sequence."""
    pairs = list(zip(sequences, starts, strict=True))[::2]
    cut, at = [ids[: start + 3] for ids, start in pairs], [start for _, start in pairs]
    return mismatch(engine, lambda s, starts: log_probs(model, s, starts), cut, at)["rollout/mismatch_max"]


@torch.no_grad()
def change(model):
    """Add noise to every weight, with 5% of its standard deviation. That is much more than an update changes a weight,
    but the model still generates text."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)


def ids(groups):
    return [[r.token_ids for r in group] for group in groups]


# ---- Weights ----


def test_log_probs_agree_before_and_after_a_push_of_changed_weights(engine, policy):
    model, tokenizer = policy
    _, sequences, starts = generated(engine, tokenizer)
    assert distance(engine, model, sequences, starts) < EXACT
    for _ in range(2):
        change(model)
        assert distance(engine, model, sequences, starts) > 1e-2  # the engine has the old weights
        engine.sync(model.named_parameters())
        assert distance(engine, model, sequences, starts) < EXACT


def test_the_weights_of_every_kind_of_layer_arrive(engine, policy):
    """Change and sync one layer at a time. The tied weight is sent under one of its names."""
    model, tokenizer = policy
    _, sequences, starts = generated(engine, tokenizer)
    layers = model.model.layers
    for layer in (model.model.embed_tokens, layers[0].self_attn.k_proj, layers[29].mlp.up_proj, model.model.norm):
        with torch.no_grad():
            layer.weight.mul_(1.3)
        engine.sync(model.named_parameters())
        assert distance(engine, model, sequences, starts) < EXACT, layer


def test_the_probe_sees_a_tied_head_and_a_prefix_cache_of_old_weights(engine, policy, monkeypatch):
    """Without the code in vllm.py or vllm_worker.py against these two mistakes, the probe shows a large difference."""
    model, tokenizer = policy
    if not hasattr(engine, "_llm"):
        pytest.skip("vLLM can be tampered with where it is in this process")
    for owner, name in ((SyncExtension, "reval_pack_head"), (engine._llm, "reset_prefix_cache")):
        _, sequences, starts = generated(engine, tokenizer)
        change(model)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args: True)
            engine.sync(model.named_parameters())  # contains the tied weight only once
            assert distance(engine, model, sequences, starts) > 1e-2, name
        engine.sync(model.named_parameters())
        assert distance(engine, model, sequences, starts) < EXACT, name


def test_a_weight_that_vllm_leaves_out_is_an_error_and_nothing_generates_until_it_comes(engine, policy):
    model, tokenizer = policy
    weights = model.state_dict()
    with pytest.raises(ValueError, match=r"1 of the model's are missing \(model.norm.weight\)"):
        engine.sync((n, w) for n, w in weights.items() if n != "model.norm.weight")
    if hasattr(engine, "_llm"):  # call vLLM directly, without the check in `sync`
        partial = [(n, w) for n, w in weights.items() if "layers.3.mlp.down_proj" not in n]
        with pytest.raises(RuntimeError, match="left out 1: model.layers.3.mlp.down_proj.weight"):
            engine._take("reval_reload", iter(partial))
        with pytest.raises(RolloutError, match="has no weights"):
            generated(engine, tokenizer)
    engine.sync(weights.items())
    _, sequences, starts = generated(engine, tokenizer)
    assert distance(engine, model, sequences, starts) < EXACT


def test_an_engine_that_slept_has_the_weights_of_the_next_sync(engine, policy, monkeypatch):
    """On a CPU, vLLM pauses and forgets its prefix cache, as on a GPU, but the memory stays."""
    model, tokenizer = policy
    if not hasattr(engine, "_llm"):
        pytest.skip("only an engine in this process says whether it sleeps")
    monkeypatch.setattr(engine, "_sleep", True)
    sleeping = engine._llm.llm_engine.is_sleeping
    groups, sequences, starts = generated(engine, tokenizer)
    assert sleeping()
    assert generated(engine, tokenizer)[0] == groups and sleeping()  # it wakes up without a sync
    change(model)
    engine.sync(model.named_parameters())
    assert not sleeping()
    assert distance(engine, model, sequences, starts) < EXACT
    assert generated(engine, tokenizer)[0] != groups and sleeping()
    assert distance(engine, model, sequences, starts) < EXACT and not sleeping()


# ---- Responses ----


def test_greedy_is_what_transformers_says(engine, policy):
    model, tokenizer = policy
    expected = HFRollout(model, tokenizer, batch_size=8).generate(
        prompts(tokenizer), responses=1, max_new_tokens=12, temperature=0.0, seed=0
    )
    groups, _, _ = generated(engine, tokenizer, responses=1, max_new_tokens=12, temperature=0.0)
    assert groups == expected


def test_seeds_repeat_and_decide(engine, policy):
    _, tokenizer = policy
    first, _, _ = generated(engine, tokenizer, responses=4, max_new_tokens=10)
    assert generated(engine, tokenizer, responses=4, max_new_tokens=10)[0] == first
    other, _, _ = generated(engine, tokenizer, responses=4, max_new_tokens=10, seed=4)
    assert ids(other) != ids(first)
    assert all(len({tuple(r.token_ids) for r in group}) > 1 for group in first)


def test_lengths_and_ends(engine, policy):
    _, tokenizer = policy
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say yes."}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    [group] = engine.generate([chat], responses=32, max_new_tokens=16, temperature=1.0, seed=0)
    assert {r.finished for r in group} == {True, False}
    for r in group:
        assert (r.token_ids[-1] == tokenizer.eos_token_id) == r.finished
        assert tokenizer.eos_token_id not in r.token_ids[:-1]
        assert r.finished or len(r.token_ids) == 16
    assert engine.generate([], responses=2, max_new_tokens=4, temperature=1.0, seed=0) == []
    with pytest.raises(ValueError, match="a prompt of 500 tokens and rollout.max_new_tokens=16 exceed the 512 tokens"):
        engine.generate([[1] * 500], responses=1, max_new_tokens=16, temperature=1.0, seed=0)


# ---- The small model, in a separate process ----


@pytest.fixture(scope="module")
def small_engine(small):
    model, _ = small
    engine = make_rollout(config("server"), *small)
    engine.sync(model.state_dict().items())
    yield engine
    engine.close()


def test_an_untied_head_arrives_too(small, small_engine):
    model, tokenizer = small
    sequences = [list(range(2, 60)), list(range(30, 45))]
    assert distance(small_engine, model, sequences, [40, 3]) < EXACT
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    assert distance(small_engine, model, sequences, [40, 3]) > 1e-3
    small_engine.sync(model.state_dict().items())
    assert distance(small_engine, model, sequences, [40, 3]) < EXACT


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_first_tokens_follow_the_policy_s_distribution(small, small_engine, temperature):
    """This shows that the temperature is applied, that no word is excluded, and that seeds are independent."""
    model, _ = small
    small_engine.sync(model.state_dict().items())
    prompt, count = [10, 20, 30], 4000
    [group] = small_engine.generate([prompt], responses=count, max_new_tokens=1, temperature=temperature, seed=1)
    seen = torch.bincount(torch.tensor([r.token_ids[0] for r in group]), minlength=102) / count
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected, other = ((logits / t).softmax(-1) for t in (temperature, 1.5 - temperature))
    # Sampling noise alone gives a distance of about half the sum over words of sqrt(2 p / (pi n)), which is 0.05.
    assert (seen - expected).abs().sum() / 2 < 0.08 < (seen - other).abs().sum() / 2
    assert all(r.finished == (r.token_ids == [1]) for r in group)


def test_more_prompt_tokens_than_one_step_takes(small, small_engine):
    """With chunked prefill, vLLM would process a prompt in parts. On a CPU, that fails for responses with a seed."""
    model, _ = small
    small_engine.sync(model.state_dict().items())
    many = [[2 + (i * 7 + j * (i + 3)) % 100 for j in range(150)] for i in range(120)]
    settings = {"responses": 1, "max_new_tokens": 2, "temperature": 1.0}
    groups = small_engine.generate(many, seed=0, **settings)
    assert small_engine.generate(many, seed=0, **settings) == groups
    assert small_engine.generate(many[:3], seed=0, **settings) == groups[:3]


def test_several_ends_and_then_a_killed_engine(small):
    model, tokenizer = small
    model.generation_config.eos_token_id = list(range(1, 60))
    engine = make_rollout(config("server"), model, tokenizer)
    engine.sync(model.state_dict().items())
    [group] = engine.generate([[70, 80]], responses=32, max_new_tokens=3, temperature=1.0, seed=0)
    assert {r.finished for r in group} == {True, False}
    for r in group:
        assert (1 <= r.token_ids[-1] < 60) == r.finished
        assert not any(1 <= token < 60 for token in r.token_ids[:-1])

    killer = threading.Timer(1.0, os.kill, (engine.pid, signal.SIGKILL))
    killer.start()
    start = time.monotonic()
    with pytest.raises(RolloutError, match=f"process {engine.pid} was killed by SIGKILL while generating"):
        while True:
            engine.generate([[10, 20]] * 8, responses=8, max_new_tokens=400, temperature=1.0, seed=0)
    assert time.monotonic() - start < 60  # much less than rollout.timeout
    killer.join()
    with pytest.raises(RolloutError):
        engine.sync(model.state_dict().items())
    engine.close()


def test_options_that_vllm_refuses_are_a_value_error(small):
    with pytest.raises((ValueError, RolloutError), match="max_model_len"):
        make_rollout(config("server", "rollout.vllm_options.max_model_len=1000000"), *small)
