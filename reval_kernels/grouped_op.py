"""torch.library ops whose Python functions take groups, that is, named tuples of tensors and numbers.

torch.library knows tensors, numbers, strings and lists, but no named tuples. `grouped_op` flattens every group of a
function's signature into the op's schema, and rebuilds the groups for the function, its fake and its autograd. Example:
a parameter `tokens: Tokens` becomes `Tensor actions, Tensor? mask` in the schema. So a new field of a group reaches
every op that takes the group.

In plain eager code nobody needs to see the op. There a call runs the op's function directly, in a
torch.autograd.Function where a gradient is needed: the op itself would pass through much Python code of torch, which
takes longer than a small computation. Both ways run the same functions, so they agree to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from . import torch_private

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = str(__package__).replace(".", "_")
"""The ops are torch.ops.<NAMESPACE>: reval_kernels. A copy of the package that was imported under another name, as
Hugging Face's `kernels` does, has ops of its own. With equal names, its ops would replace ours in silence."""


def grouped_op(name: str, mutates: Sequence[str] = ()) -> Callable[[Callable[P, R]], GroupedOp[P, R]]:
    """Register a function as the op <NAMESPACE>::<name>. `mutates` names the flat arguments that it overwrites."""
    return lambda function: GroupedOp(name, function, mutates)


class GroupedOp(Generic[P, R]):
    """A registered op. Call it with the groups; it returns the group of results that its function declares.

    The first field of the first group is a tensor, on the device of the computation.
    """

    def __init__(self, name: str, function: Callable[P, R], mutates: Sequence[str]):
        self.name = name
        kinds = get_type_hints(function)
        returned = kinds.pop("return")
        self._arguments = _places(kinds.values())
        self._results = _places(get_args(returned) or [returned])
        self._returns_tuple = bool(get_args(returned))
        flat: dict[str, Any] = {}
        for parameter, kind in kinds.items():
            fields = get_type_hints(kind) if _is_group(kind) else {parameter: kind}
            assert not fields.keys() & flat.keys(), f"two arguments of {name} are named {fields.keys() & flat.keys()}"
            flat |= fields
        self._inputs = len(flat)
        self._tensors = [i for i, kind in enumerate(flat.values()) if kind is Tensor or Tensor in get_args(kind)]
        self._function: Callable[..., R] = function
        self._mutates = bool(mutates)
        self._apply: Callable[..., Any] | None = None

        def run(*inputs: Any) -> Any:
            return tuple_of(self._computed(self.grouped(inputs), inputs[0].device))

        # torch.library makes the schema from the signature
        parameters = [
            inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=k) for n, k in flat.items()
        ]
        setattr(run, "__signature__", inspect.Signature(parameters, return_annotation=_flat_result(returned)))  # noqa: B010
        self.definition = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutates)

    def __call__(self, *groups: P.args, **none: P.kwargs) -> R:
        assert not none, "an op takes positional arguments only"
        inputs = flatten(groups)
        tensors = [x for x in map(inputs.__getitem__, self._tensors) if x is not None]
        if not self._mutates and torch_private.plain_eager(tensors):
            if not (torch.is_grad_enabled() and any([x.requires_grad for x in tensors])):
                return self._computed(groups, inputs[0].device)
            if self._apply is not None:  # else the op refuses the second order
                return self._regrouped(self._apply(*inputs, groups))
        if torch_private.forward_mode() and any(unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(
                f"{self.name} has no forward-mode derivative (torch.func.jvp, forward_ad); reval_kernels.reference has "
                "one. Detach an input that shall be a constant"
            )
        return self._regrouped(self.definition(*inputs))

    def _computed(self, groups: Sequence[Any], device: torch.device) -> R:
        """The function's result, computed without autocast, which would turn its float32 matmuls into bfloat16."""
        if not torch.is_autocast_enabled(device.type):
            return self._function(*groups)
        with torch.autocast(device.type, enabled=False):
            return self._function(*groups)

    def _regrouped(self, out: Any) -> R:
        """The groups that the function returns, from the flat results of the op."""
        if self._returns_tuple:
            out = tuple(group(*out[place]) if group else out[place] for group, place in self._results)
        elif self._results[0][0]:
            out = self._results[0][0](*out)
        return out

    def register_fake(self, function: Callable[..., Any]) -> None:
        """`function` takes the groups and returns new tensors of the results' shapes and dtypes."""
        self.definition.register_fake(lambda *inputs: tuple_of(function(*self.grouped(inputs))))

    def register_autograd(self, backward: Callable[..., tuple], save: Callable[..., None]) -> None:
        """`save(ctx, groups, output)` keeps the values that `backward(ctx, *upstream)` needs.

        `backward` returns the gradients of the first flat inputs; the inputs after them are constants.
        """

        def padded(inputs: int) -> Callable[..., tuple[Tensor | None, ...]]:
            def gradients_of_all(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
                gradients = backward(ctx, *upstream)
                return *gradients, *(None,) * (inputs - len(gradients))

            return gradients_of_all

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            save(ctx, self.grouped(inputs), output)

        self.definition.register_autograd(padded(self._inputs), setup_context=setup)

        def forward(ctx: Any, *inputs: Any) -> Any:
            groups = inputs[-1]  # the tensors are among the inputs too, because autograd looks into no group
            output = self._computed(groups, inputs[0].device)
            output = tuple_of(output) if self._returns_tuple else output  # a group is a tuple
            save(ctx, groups, output)
            return output

        functions = {"forward": staticmethod(forward), "backward": staticmethod(padded(self._inputs + 1))}
        # the profiler shows the name of the class
        graph = type(f"{NAMESPACE}::{self.name}", (torch.autograd.Function,), functions)
        self._apply = torch_private.plain_apply(graph)

    def register_no_gradient(self, message: str) -> None:
        """Differentiating the op raises RuntimeError with this message."""

        def refuse(*_: Any) -> None:
            raise RuntimeError(message)

        self.definition.register_autograd(refuse)

    def grouped(self, inputs: Sequence[Any]) -> list[Any]:
        """The groups that the function takes, from the flat arguments of the op."""
        return [group._make(inputs[place]) if group else inputs[place] for group, place in self._arguments]


def flatten(groups: Sequence[Any]) -> list[Any]:
    """A list of all fields of the groups. An element that is no group stays as it is."""
    return [x for group in groups for x in (group if isinstance(group, tuple) else (group,))]


def tuple_of(result: Any) -> Any:
    """Turn a group of results into the plain tuple that an op returns."""
    return tuple(flatten(result)) if isinstance(result, tuple) else result


def _places(kinds: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Where each argument or result lies in the flat list: (group, its slice), or (None, its place)."""
    out: list[tuple[Any, Any]] = []
    start = 0
    for kind in kinds:
        size = len(kind._fields) if _is_group(kind) else 1
        out.append((kind, slice(start, start + size)) if _is_group(kind) else (None, start))
        start += size
    return out


def _is_group(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _flat_result(kind: Any) -> Any:
    """The flat form of a return type `kind`: a group, a tuple of tensors and groups, one tensor, or None."""
    if _is_group(kind):
        return tuple[(Tensor,) * len(kind._fields)]  # type: ignore[misc]  # a type made at run time
    if kinds := get_args(kind):
        flat = [Tensor for k in kinds for _ in (k._fields if _is_group(k) else (k,))]
        return tuple[tuple(flat)]  # type: ignore[misc]
    return None if kind is type(None) else kind
