"""What only a GPU shows: graphs, streams, devices, waiting, and tensors with more than 2^31 entries.

The calls are functions of a device, and test_the_calls_of_this_file makes each of them on every machine.
"""

import warnings

import pytest
import torch
from cases import DEVICE, assert_same_bits, head, logits_and_actions, values

from reval_kernels import TokenValues, bellman_loss, linear_reval_loss, linear_token_values, token_values

pytest.importorskip("triton")
cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device: REVAL_TEST_DEVICE=cuda")
B, T, V, D = 3, 6, 129, 32


def rows(logits, actions, by):
    """Forward and backward from logits."""
    leaf = logits.detach().requires_grad_()
    out = token_values(leaf, actions, temperature=0.7, with_entropy=True, backend="triton")
    (gradient,) = torch.autograd.grad([out.v, out.log_prob, out.entropy], leaf, [by, by, by])
    return [*(x.detach() for x in out), gradient]


def bellman(q, v, log_prob, returns, rewards):
    """Forward and backward from token values."""
    leaves = [x.detach().requires_grad_() for x in (q, v, log_prob)]
    out = bellman_loss(TokenValues(*leaves), returns, rewards, beta=0.5, backend="triton")
    return [out.loss.detach(), out.residual.detach(), *torch.autograd.grad(out.loss, leaves[1:])]


def linear(hidden, weight, actions, returns, rewards):
    """Forward and backward from hidden states."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    out = linear_reval_loss(*leaves, actions, returns, rewards, beta=0.5, backend="triton")
    return [out.loss.detach(), out.residual.detach(), *torch.autograd.grad(out.loss, leaves)]


def arguments(function, device) -> list[torch.Tensor]:
    logits, actions = logits_and_actions(B, T, V)
    hidden, weight, _ = head(B, T, V, D)
    found = {
        rows: [logits, actions, torch.randn(B, T)],
        bellman: [*values(B, T, dtype=torch.float32)[:3], torch.randn(B), torch.randn(B)],
        linear: [hidden, weight, actions, torch.randn(B), torch.randn(B)],
    }[function]
    return [x.to(device) for x in found]


@pytest.mark.parametrize("function", [rows, bellman, linear])
def test_the_calls_of_this_file(function):
    assert all(x.isfinite().all() for x in function(*arguments(function, DEVICE)))


@cuda
@pytest.mark.parametrize("function", [rows, bellman])
def test_a_captured_graph_computes_new_data(function):
    """The replay has the bits of an eager call with the same data."""
    static, new = arguments(function, DEVICE), arguments(function, DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture cannot
        for _ in range(3):
            function(*static)
    torch.cuda.current_stream().wait_stream(side)
    torch.utils.deterministic.fill_uninitialized_memory = False  # its fills would be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(*static)
    for x, y in zip(static, new, strict=True):
        x.copy_(y)
    graph.replay()
    assert_same_bits([x.clone() for x in out], function(*new))


@cuda
@pytest.mark.parametrize("function", [rows, bellman, linear])
def test_autocast_changes_no_bit(function):
    inputs = arguments(function, DEVICE)
    expected = function(*inputs)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_same_bits(expected, function(*inputs))


@cuda
@pytest.mark.parametrize("function", [rows, bellman, linear])
def test_a_side_stream(function):
    """The inputs are made late on the side stream, and temporaries that were freed are written again behind it."""
    inputs = arguments(function, DEVICE)
    expected = function(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = [torch.zeros_like(x) for x in inputs]
        torch.cuda._sleep(100_000_000)
        for x, y in zip(late, inputs, strict=True):
            x.copy_(y)
        out = function(*late)
        for _ in range(20):
            torch.full((B * T * V,), torch.nan)
    side.synchronize()
    assert_same_bits(expected, out)


@cuda
@pytest.mark.parametrize("function", [rows, bellman, linear])
def test_a_device_that_is_not_the_current_one(function):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = arguments(function, "cuda:0")
    out = function(*(x.to("cuda:1") for x in inputs))
    assert all(x.device.index == 1 for x in out)
    assert_same_bits(function(*inputs), [x.to("cuda:0") for x in out])


@cuda
@pytest.mark.parametrize("function", [rows, bellman])
def test_rows_and_bellman_never_wait(function):
    inputs = arguments(function, DEVICE)
    function(*inputs)  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        out = function(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert all(x.isfinite().all() for x in out)


@cuda
def test_linear_values_wait_once_for_a_mask():
    hidden, weight, actions = head(B, T, V, D)
    mask = torch.rand(B, T) < 0.7
    linear_token_values(hidden, weight, actions, mask=mask, backend="triton")  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            linear_token_values(hidden, weight, actions, mask=mask, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert sum("synchroniz" in str(x.message) for x in found) <= 1


@cuda
def test_non_contiguous_logits():
    logits, actions, by = arguments(rows, DEVICE)
    wide = torch.full((T, B, 2 * V), torch.nan)
    wide[:, :, ::2] = logits.transpose(0, 1)
    assert_same_bits(rows(logits, actions, by), rows(wide[:, :, ::2].transpose(0, 1), actions, by))


@cuda
def test_more_than_two_to_the_31_entries():
    """14,200 rows of Qwen's vocabulary: 4.3 GB in bf16, and as much again for the gradient."""
    count, words = 14_200, 151_936
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    logits = torch.empty(count, words, dtype=torch.bfloat16).normal_()
    assert logits.numel() > 2**31
    actions, by = torch.randint(words, (count,)), torch.randn(count)
    ours = rows(logits, actions, by)
    for part in (slice(0, 2), slice(-40, None)):
        assert_same_bits([x[part].clone() for x in ours], rows(logits[part].clone(), actions[part], by[part]))
