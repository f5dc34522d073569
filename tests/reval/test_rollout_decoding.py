"""Decoding in fixed slots: every token is the one that the same noise samples from the model's own logits, without
cache, padding and batch. Prompts of unequal lengths give padding; long responses make the cache grow; ends make it
shrink.

A GPU captures the same step as a CUDA graph, which is not tested here: a graph needs that a step works on the same
tensors each time, and that is tested.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from reval.rollout import decoding
from reval.rollout.cache import GROUPED, Slots
from reval.rollout.decoding import Steps, decode, logits_of, prefill, why_unsupported
from reval.rollout.hf import HFRollout
from reval.rollout.protocol import RolloutError
from reval.rollout.sampling import sample

COMMON = list(range(20, 32))
PROMPTS = [[*COMMON, 10, 11, 12, 13, 14], [*COMMON, 20], [*COMMON, 30, 31, 32]]
UNLIKE = [[10, 11, 12, 13, 14], [20, 21], [30]]
WORDS = 102


def made(kind: str, **settings) -> PreTrainedModel:
    """A tiny random model. Large weights make its distributions far from uniform."""
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.3, "pad_token_id": 0}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**sizes | settings)
    model = getattr(transformers, kind + ("LMHeadModel" if kind == "GPT2" else "ForCausalLM"))(config).eval()
    decoding.head_of(model)  # the first call for a model runs it; the trainer calls it when it loads the model
    return model


@torch.no_grad()
def slow(model, prompt, noise, temperature, ends):
    """The response that `noise` samples: whole sequences, one at a time, no cache. numpy's cumsum is float64."""
    out = []
    for u in noise:
        logits = model(input_ids=torch.tensor([prompt + out]), use_cache=False).logits[0, -1].double().numpy()
        weights = np.exp((logits - logits.max()) / (temperature or 1e-9))
        out.append(int(np.searchsorted(np.cumsum(weights / weights.sum()), u, side="right")))
        if out[-1] in ends:
            break
    return out


def noise_for(responses, tokens, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((responses, tokens)))


def check(model, prompts, count=3, tokens=12, temperature=1.0, ends=()):
    noise = noise_for(len(prompts) * count, tokens)
    got = decode(model, prompts, count, ends=list(ends), temperature=temperature, noise=noise)
    expected = [
        slow(model, prompt, noise[i * count + j].tolist(), temperature, ends)
        for i, prompt in enumerate(prompts)
        for j in range(count)
    ]
    assert got == expected
    return got


# ---- The tokens ----


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("prompts", [PROMPTS, UNLIKE, PROMPTS[:1], [COMMON, COMMON]])
def test_tokens_are_those_of_whole_sequences(prompts, temperature):
    check(made("Llama"), prompts, temperature=temperature)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
        ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),  # positions are learned, no groups
        ("GPTNeoX", {}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Granite", {"logits_scaling": 2.0}),
        ("Phi", {}),  # the head has a bias
        ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    ],
)
def test_kinds_of_models(kind, settings):
    model = made(kind, **settings)
    assert why_unsupported(model) is None
    check(model, PROMPTS, count=2, tokens=6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_attention(attention):
    model = made("Llama")
    model.set_attn_implementation(attention)
    check(model, PROMPTS, tokens=6)
    assert model.config._attn_implementation == attention


def test_sequences_that_end_leave_the_batch_and_change_no_other():
    model, batches = made("Llama"), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    noise = noise_for(24, 40)
    ends = list(range(3, 12))
    got = decode(model, PROMPTS, 8, ends=ends, temperature=1.0, noise=noise)
    steps = batches[2:]
    lengths = sorted(map(len, got))
    assert lengths[0] < lengths[12] < lengths[-1] == len(steps) + 1
    for done, (rows, new) in enumerate(steps, 1):
        left = sum(length > done for length in lengths)
        assert new == 1 and left <= rows <= max(left, left / (7 / 8) + 1)
    alone = [decode(model, PROMPTS, 8, ends=[], temperature=1.0, noise=noise[:, : len(row)]) for row in got[:3]]
    assert all(row == other[i] for i, (row, other) in enumerate(zip(got[:3], alone, strict=True)))
    check(model, PROMPTS, count=8, tokens=40, ends=tuple(ends))


def test_prompts_are_computed_once_and_their_common_beginning_once():
    model, batches = made("Llama"), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    decode(model, PROMPTS, 8, ends=[], temperature=1.0, noise=noise_for(24, 3))
    assert batches == [(1, 12), (3, 5), (24, 1), (24, 1)]
    batches.clear()
    decode(model, UNLIKE, 8, ends=[], temperature=1.0, noise=noise_for(24, 1))
    assert batches == [(3, 5)]


# ---- The cache and the steps ----


def test_the_cache_grows_with_the_responses_and_never_beyond_what_is_needed():
    model = made("Llama")
    with torch.no_grad():
        computed = prefill(model, PROMPTS)
        slots = Slots(computed.cache, computed.valid, 2, 17 + 70)
        steps = Steps(model, decoding.head_of(model), slots)
        sizes = []
        for _ in range(70):
            steps(torch.full((6,), 5))
            sizes.append(slots.shape[1])
    assert sizes[0] == 48 and sizes[-1] == 96 and len(set(sizes)) == 2  # 17 + 1 twice, in sixteens; then 17 + 70
    assert int(slots.slot) == 87 and slots.positions[:, 0].tolist() == [87, 87, 83, 83, 85, 85]
    assert {tuple(layer.keys.shape) for layer in slots.cache.layers} == {(6, 2, 96, 8)}


def test_a_step_works_on_the_same_tensors_until_the_batch_or_the_cache_changes():
    """What a CUDA graph needs."""
    model = made("Llama")
    with torch.no_grad():
        computed = prefill(model, PROMPTS)
        slots = Slots(computed.cache, computed.valid, 2, 200)
        steps = Steps(model, decoding.head_of(model), slots)

        def places():
            layers = [x.data_ptr() for layer in slots.cache.layers for x in (layer.keys, layer.values)]
            return [x.data_ptr() for x in (slots.valid, slots.positions, slots.slot, steps._tokens)] + layers

        steps(torch.full((6,), 5))
        first = places()
        steps(torch.full((6,), 6))
        assert places() == first and steps._tokens.tolist() == [[6]] * 6
        slots.keep(torch.tensor([0, 3]))
        steps(torch.full((2,), 7))
        assert steps._tokens.shape == (2, 1) and places()[0] != first[0]


def test_steps_that_cannot_be_captured_run_as_they_are(monkeypatch):
    model = made("Llama")
    expected = check(model, PROMPTS, tokens=8)

    @contextlib.contextmanager
    def broken(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    class OnGPU(Steps):
        def __init__(self, *args):
            super().__init__(*args)
            self._capturing = True

    monkeypatch.setattr(decoding, "Steps", OnGPU)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", broken)
    noise = noise_for(9, 8)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph, so it is slow: operation not") as caught:
        assert decode(model, PROMPTS, 3, ends=[], temperature=1.0, noise=noise) == expected
    assert len([w for w in caught if "cannot be captured" in str(w.message)]) == 1  # once, not once a step


# ---- Models that only `generate` handles ----


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("Mistral", {"sliding_window": 4}, "DynamicCache"),
        ("Gemma2", {"sliding_window": 4, "head_dim": 8}, "DynamicCache"),
        ("Mamba", {"state_size": 4, "hidden_size": 16}, "."),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "ValueError"),
    ],
)
def test_other_models_generate_as_before(tiny, kind, settings, reason):
    model = made(kind, **settings)
    rollout = HFRollout(model, tiny[1], batch_size=8)
    with pytest.warns(UserWarning, match=f"{kind}.* generates slowly, by transformers' generate: .*{reason}"):
        groups = rollout.generate(PROMPTS, responses=2, max_new_tokens=6, temperature=0.0, seed=0)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = slow(model, prompt, [0.5] * 6, 0.0, rollout._ends)
        assert [r.token_ids for r in group] == [expected, expected]
    sampled = [rollout.generate(PROMPTS, responses=2, max_new_tokens=6, temperature=1.0, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_model_whose_steps_have_other_logits_is_found(monkeypatch):
    model = made("Llama")
    assert why_unsupported(model) is None
    monkeypatch.setattr(decoding, "logits_of", lambda head, hidden: logits_of(head, hidden) * 1.01)
    assert "logits differ by 1.0%" in why_unsupported(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_device_without_float64_is_found(monkeypatch):
    def fails(logits, temperature, noise):
        raise TypeError("the MPS framework doesn't support float64")

    monkeypatch.setattr(decoding, "sample", fails)
    assert why_unsupported(made("Llama")) == "TypeError: the MPS framework doesn't support float64"


def test_logits_that_are_not_finite_end_the_run_with_a_message():
    model = made("Llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(RolloutError, match="logits are not finite"):
        decode(model, PROMPTS, 2, ends=[], temperature=1.0, noise=noise_for(6, 4))
    assert model.config._attn_implementation == "sdpa" != GROUPED


# ---- The engine ----


def test_the_batch_size_changes_no_response(tiny):
    model, tokenizer = tiny
    runs = [
        HFRollout(model, tokenizer, batch_size=size).generate(
            PROMPTS, responses=4, max_new_tokens=9, temperature=1.0, seed=3
        )
        for size in (64, 5, 3, 1)
    ]
    assert all(run == runs[0] for run in runs)


def test_the_whole_seed_counts(tiny):
    """torch's generator would take 32 bits of it, which lack run.seed and the number of the process."""
    rollout = HFRollout(*tiny, batch_size=8)
    runs = [
        rollout.generate(PROMPTS, responses=4, max_new_tokens=9, temperature=1.0, seed=seed)
        for seed in (3, 3 + (1 << 32), 3 + (1 << 52))
    ]
    assert runs[0] != runs[1] != runs[2] != runs[0]


def test_progress_counts_tokens_and_sequences_of_all_batches(tiny, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))  # each look at the clock is a second later
    rollout = HFRollout(*tiny, batch_size=6)
    seen = []
    rollout.progress = lambda tokens, left: seen.append((tokens, left))
    groups = rollout.generate(PROMPTS, responses=3, max_new_tokens=5, temperature=1.0, seed=0)
    flat = [r for group in groups for r in group]
    total = sum(len(r.token_ids) for r in flat)
    assert seen[0] == (6, 9) and seen[-1] == (total, 0)
    assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in zip(seen, seen[1:], strict=False))
    assert (sum(len(r.token_ids) for r in flat[:6]), 3) in seen


# ---- Sampling ----


@pytest.mark.parametrize("words", [7, 256, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_evenly_spread_noise_samples_each_word_as_often_as_the_softmax_says(words, temperature):
    torch.manual_seed(1)
    logits, draws = 3 * torch.randn(words), 20_000
    logits[::5] = -torch.inf
    noise = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = sample(logits[:, None].repeat(1, draws), temperature, noise)
    assert (tokens.diff() >= 0).all()
    shares = (logits.double() / temperature).softmax(-1)
    counts = torch.bincount(tokens, minlength=words)
    assert (counts - draws * shares).abs().max() <= 1.01
    assert (counts[::5] == 0).all()


def test_the_ends_of_the_noise_and_bad_logits():
    last = 1 - 2**-53
    logits = torch.full((300, 6), -torch.inf)
    logits[[20, 280], :4] = 0.0
    logits[7, 4] = torch.nan
    got = sample(logits.clone(), 1.0, torch.tensor([0.0, 0.4999, 0.5001, last, 0.5, 0.5], dtype=torch.float64))
    assert got.tolist() == [20, 20, 280, 280, -1, -1]
    assert sample(logits, 0.0, torch.zeros(6)).tolist() == [20, 20, 20, 20, -1, -1]
