"""The operations that FlopCounterMode counts for our ops, against those of the definition, which uses torch's matmuls.

All sizes differ, so that a formula that confuses two of them fails. A second process imports the counter after the
package, and a third one before.
"""

import subprocess
import sys

import pytest
import torch
from cases import head
from torch.utils.flop_counter import FlopCounterMode

import reval_kernels
from reval_kernels import reference

B, T, V, D = 2, 3, 7, 5


def counted(function, needs, **options) -> tuple[int, int]:
    """The operations of the forward pass, and of both passes."""
    hidden, weight, actions = head(B, T, V, D)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    with FlopCounterMode(display=False) as counter:
        out = function(hidden, weight, actions, **options)
        forward = counter.get_total_flops()
        if any(needs):
            (out.v.sum() if hasattr(out, "v") else out.loss).backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_token_values(backend, needs, masked, with_bias):
    options = {"mask": torch.tensor([[True, False, True]] * B)} if masked else {}
    options |= {"bias": torch.randn(V)} if with_bias else {}
    expected = counted(reference.linear_token_values, needs, **options)
    assert expected == (2 * B * T * V * D, 2 * B * T * V * D * (1 + sum(needs)))
    assert counted(reval_kernels.linear_token_values, needs, backend=backend, **options) == expected


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)])
def test_the_loss(backend, needs):
    """Both passes together: the forward pass computes the gradients."""
    options = {"reference": torch.zeros(B), "rewards": torch.ones(B), "beta": 0.5}
    _, expected = counted(reference.linear_reval_loss, needs, **options)
    forward, both = counted(reval_kernels.linear_reval_loss, needs, backend=backend, **options)
    assert forward == both == expected


@pytest.mark.parametrize("first", ["import reval_kernels", "import torch.utils.flop_counter"])
def test_the_formulas_are_registered_whatever_is_imported_first(first):
    code = f"""
import sys
{first}
import reval_kernels, torch, torch.utils.flop_counter
registry = torch.utils.flop_counter.flop_registry
print(torch.ops.reval_kernels.linear_reval_loss in registry, torch.ops.aten.mm in registry)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
