"""Trajectories to batches and micro-batches. Equal beginnings are in a prefix tree once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made import random_trajectories

from reval.batching import Batch, Form, collate, micro_batches, plan
from reval.distributed import World
from reval.replay import Trajectory

CPU = torch.device("cpu")
FORMS = list(Form)


def groups(prompts: int, responses: int, seed: int = 0) -> list[Trajectory]:
    """Several responses of unequal lengths to each prompt, in random order. The first prompt is a single token."""
    rng = np.random.default_rng(seed)
    out = []
    for p in range(prompts):
        prompt = rng.integers(6, 100, 1 if p == 0 else rng.integers(2, 9))
        for _ in range(responses):
            ids = np.concatenate([prompt, rng.integers(6, 100, rng.integers(1, 8))])
            mask = np.arange(len(ids)) >= len(prompt)
            out.append(Trajectory(token_ids=ids, action_mask=mask, reward=float(rng.normal()), score=0.0, iteration=1))
    return [out[i] for i in rng.permutation(len(out))]


def path(batch: Batch, place: int) -> list[int]:
    """The tokens that the token at `place` sees, itself included."""
    if batch.tree is not None:
        seen = [k for k in range(place + 1) if place < batch.tree.ends[k]]
    else:
        seen = list(range(place - int(batch.positions.flatten()[place]), place + 1))
    assert batch.positions.flatten()[seen].tolist() == list(range(len(seen)))
    return batch.tokens.flatten()[seen].tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_state_sees_exactly_the_tokens_before_its_action(form):
    for members in (random_trajectories(6, turns=2), groups(3, 4)):
        batch = collate(members, CPU, form)
        assert batch.rewards.tolist() == pytest.approx([t.reward for t in members])
        assert batch.mask.sum(1).tolist() == batch.cu_seqlens.diff().tolist()
        for row, t in enumerate(members):
            own = slice(*batch.cu_seqlens[row : row + 2].tolist())
            assert batch.actions[own].tolist() == t.token_ids[t.action_mask].tolist()
            assert batch.pad(batch.actions)[row][batch.mask[row]].tolist() == batch.actions[own].tolist()
            for place, end in zip(batch.states[own].tolist(), np.flatnonzero(t.action_mask), strict=True):
                assert path(batch, place) == t.token_ids[:end].tolist()


def made(*sequences: tuple[int, ...]) -> list[Trajectory]:
    return [
        Trajectory(token_ids=[*ids, 9], action_mask=[*[False] * len(ids), True], reward=0.0, score=0.0, iteration=1)
        for ids in sequences
    ]


def test_the_tree_of_the_docstring():
    batch = collate(made((5, 8), (5, 6, 7)), CPU)
    assert batch.tokens.tolist() == [[5, 6, 7, 8]] and batch.positions.tolist() == [[0, 1, 2, 1]]
    assert batch.tree.ends.tolist() == [4, 3, 3, 4] and batch.tree.runs.tolist() == [0, 1, 3] and batch.tree.depth == 3
    assert batch.states.tolist() == [3, 2]


def test_equal_sequences_and_beginnings_of_others_add_no_token():
    batch = collate(made((5, 6, 7), (5, 6), (5, 6, 7), (4,)), CPU)
    assert batch.tokens.tolist() == [[4, 5, 6, 7]] and batch.states.tolist() == [3, 2, 3, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("budget", [1, 17, 40, 10_000])
def test_micro_batches_cover_all_once_and_keep_the_budget(budget, form):
    members = groups(5, 4)
    batches = list(micro_batches(members, form, budget))
    assert sorted(i for chosen in batches for i in chosen) == list(range(20))
    for chosen in batches:
        assert len(chosen) == 1 or collate([members[i] for i in chosen], CPU, form).tokens.numel() <= budget
    if budget == 10_000 and form is not Form.PADDED:
        assert len(batches) == 1


def test_micro_batches_of_trees_keep_the_responses_to_a_prompt_together():
    members = groups(5, 4)
    split = [{members[i].prefix.tobytes() for i in chosen} for chosen in micro_batches(members, Form.TREE, 60)]
    assert len(split) > 1 and sum(map(len, split)) < 5 + len(split)


def test_padded_micro_batches_have_similar_lengths():
    """Two lengths only: more micro-batches could not save padding. With all lengths equal, one is enough."""
    members = made(*[(5,) * n for n in (90, 10, 90, 10, 10, 90)])
    assert sorted(map(sorted, micro_batches(members, Form.PADDED, 10_000))) == [[0, 2, 5], [1, 3, 4]]
    assert len(list(micro_batches(made(*[(5,) * 90] * 6), Form.PADDED, 10_000))) == 1


@pytest.mark.parametrize("form", FORMS)
def test_processes_share_a_batch_and_keep_in_step(form):
    """Each trajectory goes to exactly one process, and all processes get about the same number of tokens. A process
    with fewer micro-batches gets padding ones, which have the shortest trajectory."""
    members, counts = groups(9, 8), []

    class One(World):
        def gather(self, item):
            counts.append(item)
            return [*counts, 20]  # another process has 20 micro-batches

    plans = [plan(members, One(rank, 3), CPU, form, budget=40) for rank in range(3)]
    assert all(len(p) == 20 for p in plans)
    assert sorted(i for p in plans for micro in p for i in micro.indices) == list(range(72))
    real = [[micro for micro in p if micro.indices] for p in plans]
    tokens = [sum(micro.batch.tokens.numel() for micro in p) for p in real]
    assert max(tokens) < 1.2 * min(tokens)
    padding = [micro for p in plans for micro in p if not micro.indices]
    assert padding and all(len(micro.batch.rewards) == 1 for micro in padding)
    assert all(len(micro.trajectories[0]) == min(map(len, members)) for micro in padding)


def test_the_shares_of_the_processes_split_few_groups():
    members = groups(9, 8)
    plans = [plan(members, Two(rank, 2), CPU, Form.TREE, budget=10_000) for rank in range(2)]
    assert sum(micro.batch.tokens.numel() for p in plans for micro in p) < 1.2 * collate(members, CPU).tokens.numel()


class Two(World):
    def gather(self, item):
        return [item, item]
