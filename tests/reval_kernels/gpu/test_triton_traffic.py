"""The bytes that the kernels load and store in the interpreter are within 2% of the least possible.

The row tests have V = 8192, two blocks: the few other numbers of a token are below 1% of its logits. In the linear
test D is the depth of one tile, and V is so large (V D against 128 D) that nearly all bytes read are of the head.
"""

import pytest
import torch
from cases import DEVICE, head, logits_and_actions

from reval_kernels import bellman_loss, linear_reval_loss, linear_token_values, token_values
from reval_kernels.types import TokenValues

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="counts in the interpreter")


def total(book: dict[str, int]) -> int:
    return sum(book.values())


def within(bytes_moved: int, least: int, share: float = 0.02) -> bool:
    return least <= bytes_moved <= least * (1 + share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_forward_reads_the_logits_once(dtype):
    from reval_kernels.backends.gpu.interpreter import counted

    logits, actions = logits_and_actions(3, 8192, dtype=dtype)
    with counted(logits=logits) as traffic:
        token_values(logits, actions, with_entropy=True, backend="triton")
    assert within(total(traffic.loaded), logits.nbytes)
    assert total(traffic.stored) <= 0.02 * logits.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_backward_reads_once_and_writes_once(dtype):
    from reval_kernels.backends.gpu.interpreter import counted

    logits, actions = logits_and_actions(3, 8192, dtype=dtype)
    out = token_values(logits.requires_grad_(), actions, backend="triton").log_prob
    with counted(logits=logits) as traffic:
        torch.autograd.grad(out, logits, torch.randn(3))
    assert within(total(traffic.loaded), logits.nbytes)
    assert within(total(traffic.stored), logits.nbytes)


def test_masked_rows_are_not_read():
    from reval_kernels.backends.gpu.interpreter import counted

    logits, actions = logits_and_actions(4, 8192)
    mask = torch.tensor([True, False, False, True])
    out = token_values(logits.requires_grad_(), actions, mask=mask, backend="triton").v
    with counted(logits=logits) as traffic:
        token_values(logits, actions, mask=mask, backend="triton")
        torch.autograd.grad(out, logits, torch.randn(4))
    assert within(traffic.loaded["logits"], 2 * logits.nbytes // 2)


@pytest.fixture
def pointers(monkeypatch):
    """The kernel with one tile for each program: in the other one, a program reads the same bytes for several tiles."""
    from reval_kernels.backends.gpu import linear_launch

    monkeypatch.setattr(linear_launch, "_has_tma", lambda device: False)


def test_linear_forward_loads_the_head_once_per_block_of_tokens(pointers):
    """The bytes of the load instructions, from the L2 cache or from memory: the head once per block of 128 tokens, the
    hidden states once per tile of 128 words. No program loads the same bytes twice."""
    from reval_kernels.backends.gpu.interpreter import counted

    hidden, weight, actions = head(200, 8192, 64, dtype=torch.bfloat16)
    with counted(weight=weight, hidden=hidden) as traffic:
        linear_token_values(hidden, weight, actions, backend="triton")
    blocks, tiles = 2, 8192 // 128
    assert within(traffic.loaded["weight"], blocks * weight.nbytes)
    assert within(traffic.loaded["hidden"], tiles * hidden.nbytes)
    assert traffic.distinct["weight"] == traffic.loaded["weight"]
    assert traffic.distinct["hidden"] == traffic.loaded["hidden"]
    logits_bytes = 4 * 200 * 8192
    assert total(traffic.stored) < 0.1 * logits_bytes  # 16 bytes for 128 words


@pytest.mark.parametrize("blocks", [1, 2, 16])
def test_linear_forward_needs_head_and_hidden_states_once_per_group_of_blocks(monkeypatch, pointers, blocks):
    """The bytes from memory, if the hidden states of a group of `blocks` blocks stay in the L2 cache: the head once per
    group, the hidden states once. 300 tokens are three blocks, in three groups, in two, or in one."""
    from reval_kernels.backends.gpu import linear_launch
    from reval_kernels.backends.gpu.interpreter import counted

    monkeypatch.setattr(linear_launch, "GROUP", blocks)
    hidden, weight, actions = head(300, 2048, 64, dtype=torch.bfloat16)
    tiles = 2048 // 128
    with counted(lambda program: program[0] // (blocks * tiles), weight=weight, hidden=hidden) as traffic:
        linear_token_values(hidden, weight, actions, backend="triton")
    groups = -(-3 // blocks)
    assert within(traffic.distinct["weight"], groups * weight.nbytes)
    assert within(traffic.distinct["hidden"], hidden.nbytes)


def test_the_loss_moves_six_bytes_for_each_token_and_word():
    """In bf16: a weight is written, read, and overwritten by the gradient. Then the matmuls read it. Beside that there
    are 16 bytes a token for each tile of 128 words, written once and read twice at most."""
    from reval_kernels.backends.gpu.interpreter import counted

    hidden, weight, actions = head(2, 40, 2048, 16, dtype=torch.bfloat16)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    with counted(hidden=hidden, weight=weight) as traffic:
        linear_reval_loss(*leaves, actions, torch.zeros(2), torch.ones(2), beta=1.0, backend="triton")
    entries, tiles = 80 * 2048, 2048 // 128
    parts, small = 16 * 80 * tiles, 80 * 200  # small: the numbers of a token
    assert 4 * entries + parts * 3 / 4 <= traffic.stored["other"] <= 4 * entries + parts + small
    assert 2 * entries <= traffic.loaded["other"] <= 2 * entries + 2 * parts + tiles * hidden.nbytes + small


READ = {
    "trajectory": {"v", "log_prob", "v_ref", "log_prob_ref"},
    "token": {"q", "v", "log_prob", "q_ref", "v_ref", "log_prob_ref"},
    "subtrajectory": {"v", "log_prob", "v_ref", "log_prob_ref"},
}
"""The tensors that each level reads. The residual needs v and log_prob, the TD errors need q and v."""


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", READ)
def test_bellman_reads_each_number_at_most_twice_and_writes_it_once(level, masked):
    """Two trajectories of 600 tokens. A program writes dq, dv and dlog_prob of its tokens, its residual, and its part
    of the loss in float64; with a mask, also the positions of its actions."""
    from reval_kernels.backends.gpu.interpreter import counted

    numbers = [torch.randn(2, 600) for _ in range(6)]
    names = ("q", "v", "log_prob", "q_ref", "v_ref", "log_prob_ref")
    mask = torch.arange(600).remainder(3).ne(0).expand(2, 600) if masked else None
    with counted(**dict(zip(names, numbers, strict=True))) as traffic:
        values, reference = TokenValues(*numbers[:3]), TokenValues(*numbers[3:])
        bellman_loss(values, reference, torch.randn(2), mask=mask, beta=1.0, level=level, backend="triton")
    actions = 1200 if mask is None else int(mask.sum())
    assert {n for n in names if traffic.loaded.get(n)} == READ[level]
    # the residual needs v of the first state only: 4 bytes for each of two trajectories
    least = {n: 8 if level == "trajectory" and n.startswith("v") else 4 * actions for n in READ[level]}
    assert all(least[n] <= traffic.loaded[n] <= 2 * 4 * actions for n in READ[level])
    positions = 8 * actions if masked else 0
    assert traffic.stored == {"other": 3 * 4 * 1200 + 2 * (4 + 8) + positions}
