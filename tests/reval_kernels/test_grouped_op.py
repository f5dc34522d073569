"""Groups in an op's signature: flattened in the schema, whole in the function, its fake and its autograd."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from reval_kernels.grouped_op import flatten, grouped_op


class Pair(NamedTuple):
    a: Tensor
    b: Tensor | None


class Factor(NamedTuple):
    factor: float = 1.0


class Both(NamedTuple):
    total: Tensor
    difference: Tensor


@grouped_op("test_sum_and_difference")
def sum_and_difference(pair: Pair, scale: Factor, times: int) -> tuple[Both, Tensor]:
    assert isinstance(pair, Pair) and isinstance(scale, Factor)
    b = torch.zeros_like(pair.a) if pair.b is None else pair.b
    k = scale.factor * times
    return Both(k * (pair.a + b), k * (pair.a - b)), pair.a.new_ones(2)


@sum_and_difference.register_fake
def _(pair, scale, times):
    return Both(torch.empty_like(pair.a), torch.empty_like(pair.a)), pair.a.new_empty(2)


def _save(ctx, groups, output):
    pair, scale, times = groups
    ctx.k, ctx.pair = scale.factor * times, pair.b is not None
    assert len(output) == 3


def _gradient(ctx, d_total, d_difference, _):
    return ctx.k * (d_total + d_difference), ctx.k * (d_total - d_difference) if ctx.pair else None


sum_and_difference.register_autograd(_gradient, _save)


def test_the_schema_is_flat():
    schema = str(sum_and_difference.definition._opoverload._schema)
    assert schema.endswith("(Tensor a, Tensor? b, float factor, SymInt times) -> (Tensor, Tensor, Tensor)")


@pytest.mark.parametrize("with_b", [True, False])
def test_results_and_gradients(with_b):
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    both, ones = sum_and_difference(Pair(a, b if with_b else None), Factor(0.5), 4)
    assert isinstance(both, Both) and ones.tolist() == [1, 1]
    other = b if with_b else torch.zeros(3)
    torch.testing.assert_close(both.total, 2 * (a + other))
    torch.testing.assert_close(both.difference, 2 * (a - other))
    up, down = torch.randn(3), torch.randn(3)
    leaves = (a, b) if with_b else (a,)
    gradients = torch.autograd.grad([both.total, both.difference], leaves, [up, down])
    torch.testing.assert_close(gradients[0], 2 * (up + down))
    if with_b:
        torch.testing.assert_close(gradients[1], 2 * (up - down))


def test_torch_accepts_the_op():
    groups = (Pair(torch.randn(3, requires_grad=True), None), Factor(2.0), 1)
    assert set(opcheck(sum_and_difference.definition, flatten(groups)).values()) == {"SUCCESS"}


def test_two_groups_with_one_field_name_are_refused():
    def function(one: Pair, other: Pair) -> Tensor:
        return one.a

    with pytest.raises(AssertionError, match="two arguments of test_twice are named"):
        grouped_op("test_twice")(function)


def test_keywords_are_refused():
    with pytest.raises(AssertionError, match="positional"):
        sum_and_difference(Pair(torch.ones(1), None), Factor(), times=1)
