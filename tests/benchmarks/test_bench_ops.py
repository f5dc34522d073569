"""Formulas and true results of the benchmarked ops, at shapes small enough to count by hand.

Letters: B trajectories, T tokens of each, N = B x T, V vocabulary, D width.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ops import OPS, Shape, error, read
from benchmarks.providers import EAGER, definition

CPU = torch.device("cpu")
SHAPE = Shape(trajectories=2, length=3, vocabulary=10, width=4)  # N = 6


def test_formulas_by_hand():
    by_hand = {
        # N V = 60 entries of 2 bytes, N = 6 tokens
        "token_values forward": (60 * 2 + 6 * 20, 60 * 4),
        "token_values forward+backward": (3 * 60 * 2 + 6 * 44, 60 * 8),
        # (N + V) D = 64 entries of 2 bytes; N V D = 240
        "linear_token_values forward": (64 * 2 + 6 * 20, 2 * 240 + 4 * 60),
        "linear_reval_loss forward+backward": (2 * 64 * 2 + 6 * 8, 6 * 240 + 8 * 60),
        # 2 N + V = 22 rows of 4 entries
        "linear_reval_loss of a frozen head forward+backward": (22 * 4 * 2 + 6 * 8, 4 * 240 + 8 * 60),
        "linear_token_values forward+backward": (2 * 64 * 2 + 6 * 36, 6 * 240 + 8 * 60),
        "bellman_loss forward+backward": (6 * 12, 6),
    }
    assert {name: (op.bytes(SHAPE, 2), op.flops(SHAPE)) for name, op in OPS.items()} == by_hand


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear_token_values forward", 2),
        ("linear_reval_loss forward+backward", 6),
        ("linear_reval_loss of a frozen head forward+backward", 4),
        ("linear_token_values forward+backward", 8),  # the logits twice
    ],
)
def test_the_limit_of_a_head_is_its_matmuls(name, expected):
    """torch counts 2 N V D FLOPs for a matmul. The forward has one matmul, forward and backward have three."""
    op = OPS[name]
    run = op.limit(op.inputs(SHAPE, torch.float32, CPU))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == expected * 6 * 10 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_of_rows_reads_every_entry(dtype):
    assert read(torch.ones(3, 7, dtype=dtype))() == 21


@pytest.mark.parametrize("name", OPS)
def test_truth_in_parts_is_truth_at_once(name):
    """`truth` works on some rows or trajectories at a time. The result equals one run over all of them."""
    op = OPS[name]
    x = op.inputs(Shape(128, 2, 10, 4), torch.float32, CPU)  # chunks of 64 rows; heads one trajectory at a time
    right, _ = definition(op.family, "token values" if "token" in op.family else "")
    wide = {k: t.double() if t.is_floating_point() else t for k, t in x.items()}
    whole, chunked = op.run(right, wide), op.truth(right, x)
    assert whole.keys() == chunked.keys() and error(chunked, whole) < 1e-12
    assert {f"d {k}" for k in op.wrt} <= whole.keys()


def test_plain_pytorch_is_right_in_every_family():
    for op in OPS.values():
        x = op.inputs(SHAPE, torch.float32, CPU)
        right, plain = definition(op.family, "token values")
        assert plain is EAGER[op.family]
        assert error(op.run(plain, x), op.truth(right, x)) < 1e-5


def test_error_is_relative_to_the_largest_entry_or_to_all_and_never_hides_a_hole():
    truth = {"q": torch.tensor([1.0, -4.0], dtype=torch.float64)}
    assert error({"q": torch.tensor([2.0, -4.0])}, truth) == 0.25
    assert error({"q": torch.tensor([2.0, -4.5])}, truth) == 0.3  # entry: 1 of 4; sums: 1.5 of 5
    assert error({"q": torch.tensor([math.nan, -4.0])}, truth) == math.inf
    assert error({"q": torch.tensor([1.0])}, truth) == math.inf
    assert error({"v": torch.tensor([1.0, -4.0])}, truth) == math.inf
