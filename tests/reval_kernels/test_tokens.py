"""From input_ids to actions and mask, and the returns of trajectories, each against a loop over single tokens."""

from __future__ import annotations

import pytest
import torch

from reval_kernels import TokenValues, actions_and_mask, bellman_loss, token_values, until_end

LENGTHS = [(3, 4), (1, 1), (2, 0), (5, 2)]  # (prompt, response) of each sequence; one response is empty
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def sequences() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(1, 50, (prompt + response,)) for prompt, response in LENGTHS]


def expected() -> list[tuple[int, int, int]]:
    """(sequence, index of the state, action) of every action."""
    return [
        (b, t - 1, int(ids[t]))
        for b, (ids, (prompt, _)) in enumerate(zip(sequences(), LENGTHS, strict=True))
        for t in range(prompt, len(ids))
    ]


PROMPTS = torch.tensor([prompt for prompt, _ in LENGTHS])


@pytest.mark.parametrize("left", [False, True])
def test_padded_actions(left):
    rows = sequences()
    width = max(map(len, rows))
    pads = [torch.zeros(width - len(row), dtype=torch.long) for row in rows]
    ids = torch.stack([torch.cat([pad, row] if left else [row, pad]) for row, pad in zip(rows, pads, strict=True)])
    actions, mask = actions_and_mask(ids, PROMPTS, attention_mask=ids != 0)
    shift = [len(pad) if left else 0 for pad in pads]
    found = [(b, t - shift[b], int(actions[b, t])) for b, t in mask.nonzero().tolist()]
    assert found == expected()
    assert actions.shape == mask.shape == (len(rows), width - 1)


def test_packed_actions():
    rows = sequences()
    starts = torch.tensor([0, *map(len, rows)]).cumsum(0)
    actions, mask = actions_and_mask(torch.cat(rows), PROMPTS, cu_seqlens=starts.int())
    found = [(int((starts[1:] <= i).sum()), i, int(actions[i])) for i in mask.nonzero()[:, 0].tolist()]
    assert [(b, i - int(starts[b]), a) for b, i, a in found] == expected()


def test_without_padding_every_token_after_the_prompt_is_an_action():
    actions, mask = actions_and_mask(torch.arange(8).view(2, 4), torch.tensor([1, 3]))
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    assert actions.tolist() == [[1, 2, 3], [5, 6, 7]]


def test_until_end():
    assert until_end(torch.tensor([[1, 7, 7, 1], [8, 1, 7, 1], [1, 1, 1, 1]]), [7, 8]).tolist() == [
        [True, True, False, False],
        [True, False, False, False],
        [True, True, True, True],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, r"input_ids must have shape \[B, T\] without cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4])}, r"input_ids must have shape \[N\] with cu_seqlens"),
        ({"prompt_lengths": torch.tensor([1])}, r"prompt_lengths must have shape \[2\], got \[1\]"),
        ({"prompt_lengths": torch.tensor([1, 0])}, "prompt_lengths must be at least 1"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask must have shape \[2, 4\]"),
    ],
)
def test_refused(change, message):
    given = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "prompt_lengths": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match=message):
        actions_and_mask(**given | change)


def test_refused_when_packed():
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at N = 4"):
        actions_and_mask(ids, torch.tensor([1]), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="cu_seqlens must be int32 or int64, got float32"):
        actions_and_mask(ids, torch.tensor([1]), cu_seqlens=torch.tensor([0.0, 4.0]))
    with pytest.raises(TypeError, match="prompt_lengths must be a tensor, got list"):
        actions_and_mask(ids, [1], cu_seqlens=torch.tensor([0, 4]))
    for wrong in (None, [7, None], 1.5):
        with pytest.raises(TypeError, match=r"end_tokens must be an integer or a list of integers, got"):
            until_end(ids[None], wrong)
    with pytest.raises(ValueError, match="attention_mask goes with padded tokens"):
        actions_and_mask(ids, torch.tensor([1]), cu_seqlens=torch.tensor([0, 4]), attention_mask=torch.ones(4))
    with pytest.raises(ValueError, match="tokens must have shape"):
        until_end(ids, 0)


def values_of(shape: tuple[int, ...], dtype: torch.dtype) -> TokenValues:
    torch.manual_seed(1)
    logits = (3 * torch.randn(*shape, 20, dtype=dtype)).requires_grad_()
    return token_values(logits, torch.randint(20, shape))


def looped(values: TokenValues, mask: torch.Tensor, spans: list[tuple[int, ...] | slice]) -> torch.Tensor:
    """The returns by a loop; a span is one trajectory's index into the tensors."""
    out = []
    for span in spans:
        total, seen = 0.0, False
        for v, log_prob, action in zip(
            values.v.detach()[span], values.log_prob.detach()[span], mask[span], strict=True
        ):
            if action:
                total += float(log_prob) + (0.0 if seen else float(v))
                seen = True
        out.append(total)
    return torch.tensor(out, dtype=torch.float64).to(values.v.dtype)


@DTYPES
def test_padded_returns(dtype):
    values = values_of((4, 6), dtype)
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    torch.testing.assert_close(values.returns(mask).detach(), looped(values, mask, [(b,) for b in range(4)]))
    assert values.returns(mask)[2] == 0
    assert torch.equal(values.returns(), values.returns(torch.ones_like(mask)))
    assert values.returns(mask).dtype == dtype


@DTYPES
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_returns(dtype, index):
    """An empty trajectory in the middle and at the end, and one without actions."""
    values = values_of((12,), dtype)
    mask = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1]).bool()
    bounds = [0, 3, 3, 6, 10, 12, 12]
    spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    found = values.returns(mask, torch.tensor(bounds, dtype=index))
    torch.testing.assert_close(found.detach(), looped(values, mask, spans))
    assert found[1] == found[2] == found[5] == 0


def test_a_masked_out_nan_stays_out():
    values = TokenValues(*(torch.tensor([[torch.nan, 1.0]]) for _ in range(3)))
    assert values.returns(torch.tensor([[False, True]])) == 2


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_and_exact_zero(packed):
    """The gradient is 1 at each log_prob of an action and at V(s_1). The loss of a policy against its own returns is
    exactly 0, because both are summed in float64 and rounded once."""
    shape, ends = ((24,), torch.tensor([0, 6, 12, 18, 24])) if packed else ((4, 6), None)
    values = values_of(shape, torch.float32)
    v, log_prob = (x.detach().requires_grad_() for x in (values.v, values.log_prob))
    mask = torch.rand(shape) < 0.7
    own = TokenValues(values.q.detach(), v, log_prob)
    own.returns(mask, ends).sum().backward()
    first = (mask.view(4, 6).cumsum(1) == 1) & mask.view(4, 6)
    assert torch.equal(log_prob.grad, mask.float()) and torch.equal(v.grad, first.view(shape).float())
    returns = values.returns(mask, ends).detach()
    assert bellman_loss(values, returns, torch.zeros(4), mask=mask, cu_seqlens=ends, beta=1.0).loss == 0


@pytest.mark.parametrize("packed", [False, True])
def test_under_torch_compile(packed):
    shape, ends = ((24,), torch.tensor([0, 6, 12, 18, 24])) if packed else ((4, 6), None)
    values, mask = values_of(shape, torch.float32), torch.rand(shape) < 0.7
    compiled = torch.compile(lambda values, mask, ends: values.returns(mask, ends), fullgraph=True, backend="eager")
    assert torch.equal(compiled(values, mask, ends), values.returns(mask, ends))


def test_returns_refuse_shapes():
    values = values_of((2, 3), torch.float32)
    with pytest.raises(ValueError, match=r"must have shape \[N\] with cu_seqlens, got \[2, 3\]"):
        values.returns(cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match=r"must have shape \[B, T\] without cu_seqlens, got \[6\]"):
        values_of((6,), torch.float32).returns()
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 3\], got \[3, 2\]"):
        values.returns(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool, got int64"):
        values.returns(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at N = 6"):
        values_of((6,), torch.float32).returns(cu_seqlens=torch.tensor([0, 4]))
