"""HF rollouts: the shared prefill must not change what is generated; ids come back up to the first end of sequence."""

from __future__ import annotations

import pytest
import torch

from reval.rollout.hf import HFRollout

PROMPTS = [[10, 11, 12, 13, 14], [20, 21], [30, 31, 32]]  # unequal, so that padding on the left matters


def generate(model, tokenizer, *, batch_size=64, responses=3, temperature=1.0, seed=0, tokens=6, prompts=PROMPTS):
    rollout = HFRollout(model, tokenizer, batch_size=batch_size)
    return rollout.generate(
        prompts, responses=responses, max_new_tokens=tokens, temperature=temperature, seed=seed
    )  # fmt: skip


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


def test_greedy_is_what_the_model_says_without_cache_and_padding(tiny):
    model, tokenizer = tiny
    groups = generate(model, tokenizer, temperature=0.0, responses=2)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        expected = slow_greedy(model, prompt, 6, tokenizer.eos_token_id)
        assert [r.token_ids for r in group] == [expected, expected]


def test_shared_prefill_saves_the_work_and_changes_nothing(tiny, monkeypatch):
    model, tokenizer = tiny
    rows = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    shared = generate(model, tokenizer, responses=8)
    # 3 prompts padded to 5 tokens: 4 of each once, then the last one and 5 more for 24 sequences
    assert rows[0] == 3 * 4 and rows[1] == 24
    hook.remove()
    monkeypatch.setattr(HFRollout, "_prefill", lambda self, ids, attention, count: None)
    assert ids(generate(model, tokenizer, responses=8)) == ids(shared)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_any_batch_size_gives_all_responses(tiny, batch_size):
    groups = generate(*tiny, batch_size=batch_size, responses=4, temperature=0.0)
    assert [len(group) for group in groups] == [4, 4, 4]
    assert ids(groups) == ids(generate(*tiny, responses=4, temperature=0.0))


def test_seed_decides_and_the_global_generator_stays(tiny):
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


def test_a_copy_in_another_dtype_follows_only_when_synced(tiny):
    model, tokenizer = tiny
    rollout = HFRollout(model, tokenizer, batch_size=8, dtype=torch.bfloat16)
    before = rollout._model.lm_head.weight.clone()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(rollout._model.lm_head.weight, before)
    rollout.sync(model)
    assert torch.equal(rollout._model.lm_head.weight, model.lm_head.weight.bfloat16())


def test_training_mode_is_left_as_it_was(tiny):
    model, tokenizer = tiny
    model.train()
    generate(model, tokenizer)
    assert model.training
