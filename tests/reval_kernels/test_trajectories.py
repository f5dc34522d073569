"""Trajectories, which puts the actions of each trajectory into one row, against a loop in plain Python.

Lengths may be 0, so that empty trajectories come first, last, next to each other and alone.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from reval_kernels.backends.trajectories import Trajectories, next_state
from reval_kernels.contract import Layout


@st.composite
def layouts(draw):
    """(shape, mask or None, cu_seqlens or None) of packed or padded trajectories."""
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, 5), max_size=5))
        shape, cu_seqlens = (sum(lengths),), torch.tensor([0, *lengths]).cumsum(0)
    else:
        shape, cu_seqlens = (draw(st.integers(0, 4)), draw(st.integers(0, 5))), None
    size = torch.Size(shape).numel()
    mask = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
    return torch.Size(shape), None if mask is None else torch.tensor(mask, dtype=torch.bool).view(shape), cu_seqlens


def actions_of(shape, mask, cu_seqlens) -> list[list[int]]:
    """The flat indices of each trajectory's actions."""
    bounds = [b * shape[1] for b in range(shape[0] + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    kept = [True] * shape.numel() if mask is None else mask.flatten().tolist()
    return [[i for i in range(a, b) if kept[i]] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@given(layouts(), st.sampled_from([torch.int32, torch.int64]))
def test_rows_and_tokens(layout, dtype):
    shape, mask, cu_seqlens = layout
    expected = actions_of(shape, mask, cu_seqlens)
    ours = Trajectories(
        shape,
        torch.get_default_device(),
        Layout(mask, None if cu_seqlens is None else cu_seqlens.to(dtype)),
    )
    assert ours.counts.tolist() == [len(a) for a in expected]
    assert ours.actions.tolist() == [i for a in expected for i in a]

    x = torch.randn(shape)
    rows, longest = ours.rows(x), max(map(len, expected), default=0)
    assert rows.shape == (len(expected), longest)
    flat = x.flatten()
    for row, valid, last, a in zip(rows, ours.valid, ours.last, expected, strict=True):
        assert row.tolist() == flat[a].tolist() + [0] * (longest - len(a))
        assert valid.tolist() == [h < len(a) for h in range(longest)]
        assert last.tolist() == [h == len(a) - 1 for h in range(longest)]

    kept = torch.zeros(shape.numel(), dtype=torch.bool)
    kept[ours.actions] = True
    assert torch.equal(ours.tokens(rows), x.where(kept.view(shape), 0))


def test_tokens_that_are_no_actions_are_never_read():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    x = torch.randn(2, 3).masked_fill(~mask, torch.nan)
    layout = Trajectories(x.shape, x.device, Layout(mask, None))
    assert torch.equal(layout.rows(x), torch.stack([x[0, [0, 2]], torch.stack([x[1, 2], torch.tensor(0.0)])]))
    assert (layout.tokens(layout.rows(x))[~mask] == 0).all()


def test_the_state_after_the_last_action_is_terminal():
    assert next_state(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[2, 3, 0]]
    assert next_state(torch.zeros(2, 0)).shape == (2, 0)
