"""Times one op of one provider at a time under pytest-benchmark, to compare commits during work on a kernel.

    python -m pytest benchmarks/test_single_ops.py -k "cpu and bellman"
    python -m pytest benchmarks/test_single_ops.py --benchmark-autosave, and later --benchmark-compare

Published results come from `make bench`. There the providers take turns; here one provider runs after another.
"""

from __future__ import annotations

import pytest
import torch

from .cases import OURS, tables
from .ops import OPS, error
from .providers import Provider, definition, providers
from .suite import Case, Row, judge

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    pytest.param(case, provider, id=f"{provider.name}-{case}")
    for case in tables(DEVICE.type, quick=False)
    for provider in providers(OPS[case.op].family)
    if provider.name in (*OURS, "portable", "torch eager", "torch.compile")
]


@pytest.mark.parametrize(("case", "provider"), CASES)
def test_single_op(benchmark, case: Case, provider: Provider):
    if reason := provider.missing(DEVICE.type):
        pytest.skip(reason)
    op = OPS[case.op]
    small = op.inputs(case.shape._replace(length=2), case.dtype, DEVICE)  # check before timing
    right, plain = definition(op.family, provider.computes)
    truth, function = op.truth(right, small), provider.load()
    row = Row(case.op, str(case.dtype), {}, "", provider.name, provider.computes)
    judge(row, op.run(function, small), truth, error(op.run(plain, small), truth))
    assert row.status != "wrong", row.reason

    x = op.inputs(case.shape, case.dtype, DEVICE)

    def call() -> None:
        op.run(function, x)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
