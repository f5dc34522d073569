"""The bounds for a GPU hold for every exp2 and division with the documented error, and not for a much larger one.

The interpreter's exp2 and division get a relative error of at most 2^-22, as ex2.approx and div.full have. It is a hash
of the exact result, because the instructions give one result for one input: a forward and a backward rely on that.
exp2(0) stays 1: PTX defines it so, and the weight of a row's top entry is exact only because of this.
"""

import cases
import numpy as np
import pytest
import torch
from cases import DEVICE, compare, head, logits_and_actions, upstream

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="emulates in the interpreter")
E = 2.0**-22
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 30.0, "temperature": "per token"},
    {"softcap": 5.0},
]


def emulate(monkeypatch, error: float, one_sided: bool = False) -> None:
    """Give exp2 and division in the interpreter a relative error of at most `error`; of just `error` if one_sided."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    def inexact(x, exact=False):
        if x.dtype != np.float32:
            return x
        mixed = np.ascontiguousarray(x).view(np.uint32) * np.uint32(2654435761)  # a hash of the exact result
        return np.where(exact, x, x * (1 + error * (1 if one_sided else mixed / 2.0**31 - 1))).astype(np.float32)

    def exp2(self, x):
        return self.unary_op(x, lambda a: inexact(np.exp2(a), a == 0))

    def divide(self, a, b):
        return self.binary_op(a, b, lambda x, y: inexact(np.divide(x, y)))

    monkeypatch.setattr(Builder, "create_exp2", exp2)
    monkeypatch.setattr(Builder, "create_fdiv", divide)
    monkeypatch.setattr(cases, "INSTRUCTION_ERROR", E)


def run(function: str, options: dict, scale: float = 6.0) -> None:
    shape = (3, 6)
    options = dict(options)
    if options.get("temperature") == "per token":
        options["temperature"] = 0.5 + torch.rand(shape)
    if "linear" in function:
        inputs = dict(zip(("hidden", "weight", "actions"), head(*shape, 129, 31), strict=True))
    else:
        inputs = dict(zip(("logits", "actions"), logits_and_actions(*shape, 129, scale=scale), strict=True))
    if "loss" in function:
        by = {"loss": torch.tensor(1.7)}
        options |= {"reference": torch.randn(3) * 5, "rewards": torch.tensor([1.0, 0.0, -1.0]), "beta": 0.2}
    else:
        by = upstream(torch.Size(shape))
        options["with_entropy"] = True
    compare("triton", function, inputs, by, **options)


FUNCTIONS = ["token_values", "linear_token_values", "reval_loss", "linear_reval_loss"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_documented_error_is_within_the_bounds(monkeypatch, function, options):
    emulate(monkeypatch, E)
    run(function, options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_errors_of_one_sign_are_within_the_bounds(monkeypatch, options):
    emulate(monkeypatch, E, one_sided=True)
    run("token_values", options)


def test_a_larger_error_is_found(monkeypatch):
    """The errors of the two exp2 of p add up, and log_sum's takes off one of them."""
    emulate(monkeypatch, 8 * E, one_sided=True)
    logits, actions = logits_and_actions(3, 129)
    with pytest.raises(AssertionError, match="d logits: error .* of the scale"):
        compare("triton", "token_values", {"logits": logits, "actions": actions}, {"v": torch.ones(3)})
