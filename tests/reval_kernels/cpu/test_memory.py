"""The memory of large gradients (memory.cpp). The next gradient uses freed memory, and tensors never share memory."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from reval_kernels import token_values
from reval_kernels.backends import cpu

pytestmark = [
    pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ backend: {cpu.missing()}"),
    pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is the memory not malloc's"),
]

SMALLEST = 32 << 20
"""Bytes. Memory of at least this size is kept after it is freed."""
MANY = SMALLEST // 4


def gradient(entries=MANY, dtype=torch.float32):
    return torch.ops.reval_kernels_cpu.gradient_like(torch.empty(1, dtype=dtype).expand(entries))


@pytest.fixture(autouse=True)
def only_small_blocks_wait():
    """Before each test, only two blocks of the smallest size wait. Two of these four gradients take the blocks that
    wait from earlier tests. The other two are new blocks; when they are freed, they replace the old blocks."""
    live = [gradient() for _ in range(4)]
    while live:
        live.pop(0)


def bytes_of(file, key):
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def test_a_freed_block_serves_the_next_gradient_and_a_smaller_one():
    first = gradient(3 * MANY)
    where = first.data_ptr()
    del first
    again = gradient(3 * MANY)
    assert again.data_ptr() == where
    del again
    assert gradient(2 * MANY + 1).data_ptr() == where


def test_a_block_of_more_than_twice_the_size_is_left_for_a_large_gradient():
    first = gradient(8 * MANY)
    where = first.data_ptr()
    del first
    small = gradient(2 * MANY)
    assert gradient(8 * MANY).data_ptr() == where != small.data_ptr()


@pytest.mark.parametrize("entries", [5, MANY])
def test_it_is_full_of_nan_where_torch_is_deterministic(entries):
    gradient(entries).fill_(1)
    assert gradient(entries, torch.bfloat16).isnan().all()


def test_gradients_that_live_at_a_time_share_nothing():
    live = [gradient(2 * MANY + i).fill_(i) for i in range(4)]
    live[1] = None
    live[1] = gradient(2 * MANY + 1).fill_(1)
    live.append(gradient(2 * MANY).fill_(4))
    for i, x in enumerate(live):
        assert x.min() == x.max() == i


def test_no_more_than_two_blocks_wait():
    before = bytes_of("status", "VmSize")
    live = [gradient(4 * MANY) for _ in range(6)]
    assert bytes_of("status", "VmSize") - before >= 24 * SMALLEST
    del live
    assert bytes_of("status", "VmSize") - before <= 8 * SMALLEST


def test_a_block_that_waits_is_the_kernels_to_take():
    x = gradient(4 * MANY).fill_(1)
    assert bytes_of("smaps", "LazyFree") <= 2 * SMALLEST  # the two blocks that waited before
    del x
    assert bytes_of("smaps", "LazyFree") >= 4 * SMALLEST


@pytest.mark.parametrize("entries", [MANY // 2, 2 * MANY + 3])
def test_it_is_memory_like_any(entries):
    x = gradient(entries, torch.bfloat16).fill_(2)
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    assert torch.equal(copy.deepcopy(x), x)
    x.resize_(entries + SMALLEST)
    assert (x[:entries] == 2).all()
    x.share_memory_()
    assert (x[:entries] == 2).all()
    view = x[5:9]
    del x
    assert (view == 2).all()


def test_threads_take_and_free_at_once():
    def undisturbed(value):
        return all((gradient(MANY + 1024 * ((value + i) % 3)).fill_(value) == value).all() for i in range(8))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(undisturbed, range(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_what_lay_there_comes_through(dtype):
    logits = torch.randn(63, SMALLEST // 60 // dtype.itemsize).to(dtype).requires_grad_()
    actions, mask = torch.randint(logits.shape[1], (63,)), torch.rand(63) < 0.8

    def run():
        values = token_values(logits, actions, mask=mask)
        return torch.autograd.grad((values.q * 0.3 + values.v).sum(), logits)[0]

    first = run()
    expected, where = first.clone(), first.data_ptr()
    first.fill_(float("nan"))
    del first
    second = run()
    assert second.data_ptr() == where
    assert torch.equal(second, expected)
