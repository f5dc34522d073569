"""Cases of the row kernels that test_values.py, which runs on every backend, does not have.

Rows here need several blocks and several programs. With blocks of 16 words, V = 129 ends one word into the ninth block,
and two blocks per program make five programs. One case has the real V = 151,936: 38 blocks, three programs.
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import DEVICE, assert_same_bits, compare, evaluate, logits_and_actions, upstream

from reval_kernels import reference, token_values

triton = pytest.importorskip("triton")


@pytest.fixture(params=[1, 2, 9])
def small_blocks(request, monkeypatch):
    """Blocks of 16 words; the parameter is the number of blocks per program."""
    from reval_kernels.backends.gpu import rows

    def row_blocks(vocabulary):
        return 16, 1, request.param, triton.cdiv(triton.cdiv(vocabulary, 16), request.param)

    monkeypatch.setattr(rows, "row_blocks", row_blocks)


OPTIONS = [{}, {"softcap": 5.0, "temperature": 0.7}, {"temperature": torch.tensor([0.5, 1, 2])}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_shared_by_programs(small_blocks, dtype, options):
    logits, actions = logits_and_actions(3, 129, dtype=dtype)
    mask = torch.tensor([False, True, True])  # upstream() gives the second token gradient 0, so the first is masked
    inputs = {"logits": logits, "actions": actions}
    compare("triton", "token_values", inputs, upstream(actions.shape), mask=mask, with_entropy=True, **options)


def test_words_that_tie_for_the_top(small_blocks):
    """The ties are in one lane, across lanes and across programs. All of these words but one count in s (common.py)."""
    logits, actions = torch.zeros(2, 129), torch.tensor([0, 128])
    logits[1, ::7] = 3.0
    inputs = {"logits": logits, "actions": actions}
    compare("triton", "token_values", inputs, upstream(actions.shape), with_entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_top_word_at_every_place_of_a_group(small_blocks, dtype):
    """A lane joins 4 (float32) or 8 (bfloat16) neighbours before it adds them to its sums. The action is the top word,
    its neighbour ties with it in every second row, and the maximum rises from block to block in every third."""
    logits, _ = logits_and_actions(32, 49, dtype=dtype)
    actions = torch.arange(32)
    logits[torch.arange(32), actions] = 9.0
    even = torch.arange(0, 32, 2)
    logits[even, even + 1] = 9.0
    logits[::3, 33] = 10.0
    inputs = {"logits": logits, "actions": actions}
    compare("triton", "token_values", inputs, upstream(actions.shape), with_entropy=True)


@pytest.mark.parametrize("place", [0, 3, 17, 128])
def test_infinite_and_missing_logits(small_blocks, place):
    """As in logsumexp: v is inf if one logit is inf, and NaN if one is NaN, whichever block holds it."""
    logits, actions = logits_and_actions(3, 129)
    logits[0, place], logits[1, place], logits[2, place] = torch.inf, torch.nan, -torch.inf
    actions[:] = 64
    ours, truth = token_values(logits, actions, backend="triton"), reference.token_values(logits, actions)
    assert ours.v[0] == torch.inf and ours.v[1].isnan()
    torch.testing.assert_close(ours.v[2], truth.v[2])
    assert ours.log_prob[0] == -torch.inf


@pytest.mark.parametrize("where", ["first block", "middle block", "all but one", "everything"])
def test_blocks_at_minus_infinity(small_blocks, where):
    logits, actions = logits_and_actions(2, 129)
    hidden = {"first block": slice(0, 16), "middle block": slice(48, 96), "all but one": slice(1, None)}
    logits[:, hidden.get(where, slice(None))] = -torch.inf
    actions[:] = 0 if where == "all but one" else 110
    if where == "everything":
        ours = token_values(logits, actions, backend="triton")
        assert (ours.v == -torch.inf).all()
    else:
        inputs = {"logits": logits, "actions": actions}
        compare("triton", "token_values", inputs, upstream(actions.shape), with_entropy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_vocabulary(dtype):
    """One row; its action is in the last block, which is not full."""
    logits, _ = logits_and_actions(1, 151_936, dtype=dtype)
    inputs = {"logits": logits, "actions": torch.tensor([151_900])}
    compare("triton", "token_values", inputs, upstream(torch.Size([1])), with_entropy=True)


def test_softcap_comes_before_the_padding():
    """V = 50257 ends in the middle of the last block. The padding must have weight 0: softcap(-inf) would give each
    padding entry the weight exp(-softcap)."""
    logits, actions = logits_and_actions(1, 50_257, scale=0.01)
    inputs = {"logits": logits, "actions": actions}
    compare("triton", "token_values", inputs, upstream(actions.shape, "v", "log_prob"), softcap=1.0)


def test_a_token_s_numbers_do_not_depend_on_its_company():
    logits, actions = logits_and_actions(7, 33_000)
    together = token_values(logits, actions, with_entropy=True, backend="triton")
    alone = token_values(logits[3:4], actions[3:4], with_entropy=True, backend="triton")
    assert_same_bits([x[3:4] for x in together], list(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_at_every_address(dtype):
    """The stride of the words and the alignment of the row change how a kernel loads, not what it computes."""
    logits, actions = logits_and_actions(2, 5000, dtype=dtype)
    apart = torch.stack([logits, logits], -1)[..., 0]
    moved = torch.nn.functional.pad(logits, (1, 0)).flatten()[1:].as_strided((2, 5000), (5001, 1))
    whole = token_values(logits, actions, with_entropy=True, backend="triton")
    for other in (apart, moved):
        assert torch.equal(other, logits) and other.stride() != logits.stride()
        assert_same_bits(list(whole), list(token_values(other, actions, with_entropy=True, backend="triton")))


def test_masked_rows_are_zero_with_one_and_with_several_programs():
    for vocabulary in (7, 70_000):
        logits, actions = logits_and_actions(3, vocabulary)
        mask = torch.tensor([True, False, True])
        ours = token_values(logits, actions, mask=mask, with_entropy=True, backend="triton")
        assert all((x[1] == 0) and (x[0] != 0) for x in ours)


def test_actions_at_unaligned_addresses():
    logits, _ = logits_and_actions(4, 129)
    for dtype in (torch.int32, torch.int64):
        actions = torch.randint(129, (5,), dtype=dtype)[1:]
        assert actions.data_ptr() % 16 != 0
        compare("triton", "token_values", {"logits": logits, "actions": actions}, upstream(actions.shape, "q", "v"))


@pytest.mark.parametrize("shape", [(2, 2, 3, 9), (2, 3, 9)])
def test_more_dimensions_than_a_kernel_addresses(shape):
    """Three leading dimensions that do not merge go to the portable backend."""
    logits, _ = logits_and_actions(*shape)
    logits = logits.transpose(0, -2)
    actions = torch.randint(shape[-1], logits.shape[:-1])
    compare("triton", "token_values", {"logits": logits, "actions": actions}, upstream(actions.shape, "q", "v"))


def test_in_place_gradient_by_several_programs(small_blocks):
    """Every program overwrites its blocks of the row. No program may read the action's logit from another program's
    blocks."""
    logits, actions = logits_and_actions(2, 129, dtype=torch.bfloat16)
    wanted = evaluate(
        token_values, {"logits": logits, "actions": actions}, upstream(actions.shape, "log_prob"), backend="triton"
    )["d logits"]
    torch.manual_seed(1)
    leaf = logits.clone().requires_grad_()
    work = leaf * 1
    out = token_values(work, actions, inplace_grad=True, backend="triton").log_prob
    by = torch.randn(2)
    (gradient,) = torch.autograd.grad(out, work, by)
    assert gradient.data_ptr() == work.data_ptr()
    again = token_values(leaf, actions, backend="triton").log_prob
    assert_same_bits(gradient, torch.autograd.grad(again, leaf, by)[0])
    assert wanted.shape == gradient.shape


WIDE = """
import mmap, torch
import reval_kernels
rows, words, stride = 3, 7, 2**30
pages = mmap.mmap(-1, 2 * ((rows - 1) * stride + words))  # only pages that are touched use memory
memory = torch.frombuffer(pages, dtype=torch.bfloat16)
logits = memory.as_strided((rows, words), (stride, 1))
logits.copy_(torch.randn(rows, words))
actions = torch.tensor([1, 6, 3])
from reval_kernels.backends.gpu import rows as kernels
from unittest import mock
# The interpreter copies whole storages back and forth, which would touch every page.
from triton.runtime.interpreter import GridExecutor
with mock.patch.object(GridExecutor, "_restore_args_dev", lambda *args: None):
    leaf = logits.requires_grad_()
    out = reval_kernels.token_values(leaf, actions, backend="triton")
    wanted = reval_kernels.token_values(logits.detach().contiguous(), actions, backend="portable")
    for a, b in zip(out[:3], wanted[:3]):
        torch.testing.assert_close(a, b)
print("equal")
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter")
def test_offsets_beyond_two_to_the_31():
    """A row stride of 2^30: the third row starts at 2^31, where a 32-bit offset is negative."""
    done = subprocess.run(
        [sys.executable, "-c", WIDE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_fp64_goes_to_the_portable_backend():
    logits, actions = logits_and_actions(3, 9, dtype=torch.float64)
    ours, plain = (f(logits, actions) for f in (lambda *x: token_values(*x, backend="triton"), reference.token_values))
    assert ours.q.dtype == torch.float64 and torch.allclose(ours.v, plain.v, rtol=1e-14)
