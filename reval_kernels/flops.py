"""The number of operations of our ops, for torch.utils.flop_counter.FlopCounterMode.

An op counts what the same step costs with stored logits and torch's matmuls: 2 N V D for the logits, and 2 N V D for
each of the gradients of hidden states and weight. So these are not counted:

- what a kernel saves at masked tokens, because N counts all tokens: the shapes do not show how many are masked;
- logits that the backward computes again, as if they were stored;
- all work that is not a matmul (softmax, losses, bias), as in torch's own formulas.

`linear_reval_loss` computes its gradients in the forward pass, so they are counted there.

Letters: N tokens, V words, D features.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import library
from .grouped_op import GroupedOp

COUNTER = "torch.utils.flop_counter"


def _product(hidden: Sequence[int], weight: Sequence[int]) -> int:
    """The operations of one matmul of the shapes hidden [..., D] and weight [V, D]."""
    return 2 * math.prod(hidden) * weight[0]


def values(hidden: Sequence[int], weight: Sequence[int], **_: Any) -> int:
    """linear_token_values: the logits."""
    return _product(hidden, weight)


def gradients(hidden: Sequence[int], weight: Sequence[int], needs_hidden: bool, needs_weight: bool, **_: Any) -> int:
    """linear_token_values_backward: the gradients that are asked for."""
    return _product(hidden, weight) * (needs_hidden + needs_weight)


def loss(hidden: Sequence[int], weight: Sequence[int], needs_hidden: bool, needs_weight: bool, **_: Any) -> int:
    """linear_reval_loss: the logits and the gradients that are asked for."""
    return _product(hidden, weight) * (1 + needs_hidden + needs_weight)


FORMULAS: dict[GroupedOp, Callable[..., int]] = {
    library.linear_token_values: values,
    library.linear_token_values_backward: gradients,
    # The gradient of hidden states for a frozen head. The forward pass has summed it already (frozen_head.py).
    library.linear_expected_backward: values,
    library.linear_reval_loss: loss,
}


def register(counter: ModuleType) -> None:
    """Register the formulas with the module torch.utils.flop_counter."""
    for op, formula in FORMULAS.items():
        _register(counter, op, formula)


def _register(counter: ModuleType, op: GroupedOp, formula: Callable[..., int]) -> None:
    overload = op.definition._opoverload
    names = [argument.name for argument in overload._schema.arguments]

    def by_name(*shapes: Any, **_: Any) -> int:
        return formula(**dict(zip(names, shapes, strict=True)))

    counter.register_flop_formula(overload.overloadpacket)(by_name)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas when a program imports torch.utils.flop_counter. This package does not import that module,
    because it imports Triton."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)  # the next line asks all other finders
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
