"""The portable backend: the size of the chunks changes the memory, and nothing else.

V = 129 and D = 31. Chunks have 1 token, 4 tokens, or 29 tokens, which leaves a last piece of 1. Trajectories are longer
than a chunk, shorter, or empty. Peak memory is the sum of the allocations that torch's profiler records.
"""

import pytest
import torch
from cases import (
    LARGEST,
    assert_close,
    assert_same_bits,
    compare,
    evaluate,
    head,
    logits_and_actions,
    torch_error,
    upstream,
)
from torch.profiler import ProfilerActivity, profile

import reval_kernels
from reval_kernels import linear_reval_loss, linear_token_values, reference
from reval_kernels.backends import chunks, frozen_head, gpu, portable

V, D = 129, 31
LENGTHS = [0, 3, 0, 11, 1, 0, 0, 8, 2, 5, 0]


@pytest.fixture(params=[1, 4, 29])
def small_chunks(request, monkeypatch):
    """The parameter is the number of tokens of a chunk."""
    monkeypatch.setattr(portable, "ROWS_CHUNK", request.param * V)
    monkeypatch.setattr(chunks, "LINEAR_CHUNK", request.param * V)
    monkeypatch.setattr(frozen_head, "ENTRIES", request.param * D)


def masked_batch():
    hidden, weight, actions = head(5, 6, V, D)
    mask = torch.rand(5, 6) < 0.7
    hidden[~mask], actions[~mask] = torch.nan, -100
    return {"hidden": hidden, "weight": weight, "actions": actions, "bias": torch.randn(V)}, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_values_by_chunks(small_chunks, dtype):
    logits, actions = logits_and_actions(5, 6, V, dtype=dtype)
    mask, temperature = torch.rand(5, 6) < 0.7, torch.rand(5, 6) + 0.5
    options = {"mask": mask, "temperature": temperature, "softcap": 20.0, "with_entropy": True}
    inputs, by = {"logits": logits, "actions": actions}, upstream((5, 6))
    chunked = compare("portable", "token_values", inputs, by, **options)
    portable.ROWS_CHUNK = 1 << 21
    whole = evaluate(reval_kernels.token_values, inputs, by, backend="portable", **options)
    assert_same_bits(chunked, whole)  # each row is computed on its own


def test_inplace_gradient_by_chunks(small_chunks):
    logits, actions = logits_and_actions(5, 6, V)
    expected = evaluate(
        reval_kernels.token_values,
        {"logits": logits, "actions": actions},
        {"log_prob": torch.ones(5, 6)},
        backend="portable",
    )["d logits"]
    out = reval_kernels.token_values(logits.requires_grad_(), actions, inplace_grad=True, backend="portable")
    out.log_prob.sum().backward()
    assert_same_bits(logits.grad, expected)


def test_a_frozen_head_by_chunks(small_chunks):
    """Masked, with a temperature for each token and a softcap: every gradient of a token goes to its own place."""
    inputs, mask = masked_batch()
    hidden = inputs.pop("hidden")
    by = {name: torch.randn(5, 6) for name in ("q", "v", "log_prob")}

    def gradient(**frozen) -> torch.Tensor:
        options = {"mask": mask, "temperature": torch.linspace(0.5, 1.5, 30).view(5, 6), "softcap": 20.0}
        function = linear_token_values if frozen else reference.linear_token_values
        leaf = hidden.clone() if frozen else hidden.double()
        given = inputs if frozen else {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
        out = function(leaf.requires_grad_(), **given, **options, **frozen)
        return torch.autograd.grad([getattr(out, k) for k in by], leaf, [g.to(out.q.dtype) for g in by.values()])[0]

    ours, truth = gradient(backend="portable"), gradient()
    assert torch_error(ours, truth) < 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_token_values_by_chunks(small_chunks, dtype):
    inputs, mask = masked_batch()
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    compare("portable", "linear_token_values", inputs, upstream((5, 6)), mask=mask, with_entropy=True)


@pytest.mark.parametrize("level", ["trajectory", "token", "subtrajectory"])
@pytest.mark.parametrize("cached", [False, True])
def test_linear_reval_loss_by_chunks(small_chunks, level, cached):
    """Loss, residuals and gradients are those of one big chunk. Some trajectories need several small chunks."""
    if cached and level != "trajectory":
        return
    n, ends = sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0)
    hidden, weight, actions = head(n, V, D, dtype=torch.float64)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions, "bias": torch.randn(V, dtype=torch.float64)}
    anchor = reference.token_values(*logits_and_actions(n, V, dtype=torch.float64))
    options = {"cu_seqlens": ends, "rewards": torch.randn(len(LENGTHS)), "beta": 0.3, "level": level}
    options |= {"reference": torch.randn(len(LENGTHS)) if cached else anchor, "temperature": torch.rand(n) + 0.5}
    one = {"loss": torch.ones(())}
    chunked = compare("portable", "linear_reval_loss", inputs, one, **options)
    residual = linear_reval_loss(**inputs, **options, backend="portable").residual
    chunks.LINEAR_CHUNK = 1 << 24
    whole = evaluate(linear_reval_loss, inputs, one, backend="portable", **options)
    for name, x in whole.items():
        assert_close(chunked[name], x)
    assert_close(residual, linear_reval_loss(**inputs, **options, backend="portable").residual)


def test_gaps_and_needs_by_chunks(small_chunks):
    """Padded bf16 trajectories with NaN in the gaps, with all gradients and with a frozen head: the gradients reach the
    right tokens."""
    inputs, mask = masked_batch()
    inputs = {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
    options = {"mask": mask, "rewards": torch.randn(5), "reference": torch.randn(5), "beta": 0.3}
    all_of_them = compare("portable", "linear_reval_loss", inputs, {"loss": torch.ones(())}, **options)
    hidden = inputs.pop("hidden").requires_grad_()
    linear_reval_loss(hidden, **inputs, **options, backend="portable").loss.backward()
    assert_same_bits(hidden.grad, all_of_them["d hidden"])


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
def test_a_narrow_head_is_widened_in_parts(monkeypatch, size):
    """Parts of 1, 5 and 64 words, with a smaller last part, and one part of all words."""
    monkeypatch.setattr(chunks, "LINEAR_CHUNK", size * 4 * D)
    hidden, weight, actions = head(6, V, D, dtype=torch.bfloat16)
    tiles = [words for words, _ in chunks.tiles(weight, torch.float32)]
    assert len(tiles) == -(-V // size) and tiles[0].start == 0 and tiles[-1].stop == V
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    compare("portable", "linear_token_values", inputs, upstream((6,)), with_entropy=True)


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ([3, 4, 5], 12, [(0, 3, 0, 12)]),
        ([3, 4, 5], 11, [(0, 2, 0, 7), (2, 3, 7, 12)]),
        ([0, 9, 0], 4, [(0, 2, 0, 9)]),
        ([9, 0, 9], 4, [(0, 1, 0, 9), (1, 3, 9, 18)]),
        ([0, 0], 4, []),
        ([], 4, []),
    ],
)
def test_whole_trajectories(counts, size, expected):
    runs = [(t.start, t.stop, a.start, a.stop) for t, a in chunks.whole_trajectories(counts, size)]
    assert runs == expected


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(function) -> int:
    """The largest number of bytes that the call held at one time, not counting bytes held before the call."""
    function()  # the first call fills all caches
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    assert events, "the profiler saw no allocation"
    return peak


def sizes(backend: str) -> tuple[int, int, int]:
    """Tokens, words and width. The logits have 8 MiB, the head 256 KiB, the hidden states 32 KiB. For a slow backend
    they have 64, 4 and 1 KiB."""
    return (512, 4096, 16) if backend not in LARGEST else (64, 256, 4)


@pytest.mark.parametrize("size", ["portable", *LARGEST])
def test_peak_bytes_counts_the_logits(size):
    tokens, words, width = sizes(size)
    hidden, weight, actions = head(tokens, words, width)
    assert peak_bytes(lambda: reference.linear_token_values(hidden, weight, actions)) > 4 * tokens * words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["linear_token_values", "frozen head", "linear_reval_loss"])
@pytest.mark.parametrize("trajectories", [32, 1])
def test_the_logits_never_exist_as_a_whole(backend, monkeypatch, function, trajectories, dtype):
    """Forward and backward of 512 tokens, in 32 trajectories or one, need less than half of the logits' memory."""
    tokens, words, width = sizes(backend)
    for module in (chunks, gpu):
        monkeypatch.setattr(module, "LINEAR_CHUNK", tokens // 16 * words)
    hidden, weight, actions = head(trajectories, tokens // trajectories, words, width, dtype=dtype)
    leaves = hidden.requires_grad_(), weight.requires_grad_(function != "frozen head")
    count = torch.zeros(len(hidden))

    def run():
        if function != "linear_reval_loss":
            values = reval_kernels.linear_token_values(*leaves, actions, backend=backend)
            out = values.v.sum() + values.log_prob.sum()
        else:
            out = linear_reval_loss(*leaves, actions, count, count, beta=0.5, backend=backend).loss
        torch.autograd.grad(out, [x for x in leaves if x.requires_grad])

    assert peak_bytes(run) < 4 * tokens * words / 2
