"""Trajectories in and out of padded tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reval.batching import collate, micro_batches


def test_states_line_up_with_the_token_that_follows(trajectories):
    members = trajectories(6, turns=2)
    batch = collate(members, torch.device("cpu"))
    for row, t in enumerate(members):
        n = len(t)
        assert batch.token_ids[row, :n].tolist() == t.token_ids.tolist()
        assert batch.attention_mask[row].tolist() == [1] * n + [0] * (batch.token_ids.shape[1] - n)
        taken = batch.actions[row][batch.mask[row]].tolist()
        assert taken == t.token_ids[t.action_mask].tolist()
    rows, columns = batch.first_states()
    assert columns.tolist() == [int(np.argmax(t.action_mask)) - 1 for t in members]
    assert batch.mask[rows, columns].all()
    assert batch.rewards.tolist() == pytest.approx([t.reward for t in members])


@pytest.mark.parametrize("budget", [1, 17, 40, 10_000])
def test_micro_batches_cover_all_once_and_keep_the_budget(trajectories, budget):
    members = trajectories(23)
    parts = list(micro_batches(members, budget))
    assert sorted(i for part in parts for i in part) == list(range(23))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(members[i]) for i in part) <= budget
