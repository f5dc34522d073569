"""The implementations of the ops: our backends, the definition, plain PyTorch (eager and compiled), peers (peers.py).

A provider's function takes the op's inputs by name and returns its outputs by name; `Op.run` adds the backward.
`computes` names the outputs. The check compares a provider with the float64 definition of these outputs only.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import reval_kernels
from reval_kernels import TokenValues, reference

from .ops import BETA, Function, Tensors

COMPUTES = {
    "token values": "q, v and log_prob of every token",
    "log_prob": "log_prob of every token; no q, no v",
    "ReVal loss": "V(s_1) + sum of log_prob over each trajectory, its residual, the mean square",
    "cross entropy": "the mean cross entropy of all tokens: the same matmuls, but no values and nothing by trajectory",
    "Bellman loss": "the mean squared residual of trajectories, from token values",
}
FAMILIES = {
    "token_values": "token values",
    "linear_token_values": "token values",
    "linear_reval_loss": "ReVal loss",
    "bellman_loss": "Bellman loss",
}
"""The families of functions, and the key of COMPUTES for our function in each family."""


Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute the ops of a family."""

    name: str
    family: str
    computes: str
    load: Callable[[], Function]
    """Returns the function. All imports of the provider, and torch.compile, happen here."""
    missing: Callable[[str], str | None] = lambda device: None
    """From a device type to the reason why the provider cannot run there; None if it can."""
    compiled: bool = False
    overwrites: str = ""
    """Name of the input that the provider overwrites. The provider gets a copy, made outside the timed part."""
    note: str = ""
    """What the results must say beside `computes`, for example that a gradient is summed in bf16."""
    rounds: Rounding | None = None
    """How the provider rounds the operands of its matmuls. The yardstick for its error is plain PyTorch on operands
    that are rounded in this way."""


# --- plain PyTorch, as written by hand; its error is the yardstick ---------------------------------------------------


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def eager_token_values(logits: Tensor, actions: Tensor) -> Tensors:
    z = wide(logits)
    q, v = z.gather(-1, actions[..., None])[..., 0], z.logsumexp(-1)
    return {"q": q, "v": v, "log_prob": q - v}


def eager_linear_token_values(hidden: Tensor, weight: Tensor, actions: Tensor) -> Tensors:
    """The logits have the inputs' dtype, as the logits of a model's head do."""
    return eager_token_values(hidden @ weight.T, actions)


def eager_bellman_loss(q: Tensor, v: Tensor, log_prob: Tensor, returns: Tensor, rewards: Tensor) -> Tensors:
    residual = v[:, 0] + log_prob.sum(1) - returns - rewards / BETA
    return {"loss": residual.square().mean(), "residual": residual}


def eager_linear_reval_loss(
    hidden: Tensor, weight: Tensor, actions: Tensor, returns: Tensor, rewards: Tensor
) -> Tensors:
    return eager_bellman_loss(**eager_linear_token_values(hidden, weight, actions), returns=returns, rewards=rewards)


def eager_cross_entropy(hidden: Tensor, weight: Tensor, actions: Tensor, **unused: Tensor) -> Tensors:
    return {"loss": F.cross_entropy(wide(hidden @ weight.T).flatten(0, -2), actions.flatten())}


EAGER: dict[str, Function] = {
    "token_values": eager_token_values,
    "linear_token_values": eager_linear_token_values,
    "linear_reval_loss": eager_linear_reval_loss,
    "bellman_loss": eager_bellman_loss,
}


def no_compiler(device: str) -> str | None:
    if device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "no C++ compiler, which torch.compile needs for the CPU"
    return None


# --- ours ------------------------------------------------------------------------------------------------------------


def library_function(library: ModuleType, family: str, **options) -> Function:
    """The public function named `family` of `library`, which is reval_kernels or reval_kernels.reference."""

    def run(**x) -> Tensors:
        if "returns" in x:
            x |= {"reference": x.pop("returns"), "beta": BETA}
        if family == "bellman_loss":
            x["values"] = TokenValues(x.pop("q"), x.pop("v"), x.pop("log_prob"))
        out = getattr(library, family)(**x, **options)
        return {k: t for k, t in out._asdict().items() if t is not None}

    return run


def backend_missing(backend: str, device: str) -> str | None:
    if backend == "triton" and device == "cpu":
        return "on a CPU its kernels run in Triton's interpreter, for tests"
    if backend == "cpu" and device != "cpu":
        return "for tensors on the CPU"
    return reval_kernels.backends()[backend].reason


# --- fp32 operands on tensor cores -----------------------------------------------------------------------------------


def to_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def to_two_bf16(x: Tensor) -> Tensor:
    """The sum of two bf16 numbers that is nearest to x: 16 bits of x."""
    high = to_bf16(x)
    return high + to_bf16(x - high)


def to_tf32(x: Tensor) -> Tensor:
    """x with the 10 bits of mantissa that TF32 keeps of 23."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


PRECISIONS: dict[str, Rounding | None] = {
    "exact": None,
    "bf16x3": to_two_bf16,
    "tf32": to_tf32,
    "bf16": to_bf16,
}
"""The values of the argument `precision` of the linear functions: how each rounds fp32 operands of a matmul."""


def precision_missing(family: str, device: str) -> str | None:
    if "precision" not in inspect.signature(getattr(reval_kernels, family)).parameters:
        return f"reval_kernels.{family} has no argument precision in this version"
    return backend_missing("triton", device)


def precisions(family: str) -> list[Provider]:
    """Our GPU backend at every precision of fp32 operands, and plain PyTorch in fp32 and with bf16 operands."""
    eager = EAGER[family]

    def narrow(hidden: Tensor, weight: Tensor, **others: Tensor) -> Tensors:
        return eager(hidden=hidden.bfloat16(), weight=weight.bfloat16(), **others)

    ours = [
        Provider(
            f"triton {precision}",
            family,
            FAMILIES[family],
            partial(library_function, reval_kernels, family, backend="triton", precision=precision),
            partial(precision_missing, family),
            note=f"; matmuls in precision {precision!r}",
            rounds=rounds,
        )
        for precision, rounds in PRECISIONS.items()
    ]
    plain = partial(Provider, family=family, computes=FAMILIES[family])
    return [
        *ours,
        plain("torch eager", load=lambda: eager),
        plain(
            "torch eager, bf16 operands",
            load=lambda: narrow,
            note="; operands, logits and their gradient are rounded to bf16",
            rounds=to_bf16,
        ),
    ]


# --- the registry ----------------------------------------------------------------------------------------------------


def providers(family: str) -> list[Provider]:
    """All providers of a family, ours first. The list includes providers that cannot run on this machine."""
    from .peers import PEERS  # imported here because peers.py imports Provider from this file

    computes, eager = FAMILIES[family], EAGER[family]
    ours = [
        Provider(
            name,
            family,
            computes,
            partial(library_function, reval_kernels, family, backend=name),
            partial(backend_missing, name),
        )
        for name in reval_kernels.backends()
    ]
    plain = [
        Provider("reference", family, computes, lambda: library_function(reference, family)),
        Provider("torch eager", family, computes, lambda: eager),
        Provider(
            "torch.compile",
            family,
            computes,
            lambda: torch.compile(eager, fullgraph=True, dynamic=False),
            no_compiler,
            compiled=True,
        ),
    ]
    return ours + plain + [p for p in PEERS if p.family == family]


def definition(family: str, computes: str) -> tuple[Function, Function]:
    """Two functions: the definition (the truth, in float64) and plain PyTorch (the yardstick for errors)."""
    if computes == "cross entropy":
        return eager_cross_entropy, eager_cross_entropy
    truth, plain = library_function(reference, family), EAGER[family]
    if computes == "log_prob":
        return _only_log_prob(truth), _only_log_prob(plain)
    return truth, plain


def _only_log_prob(function: Function) -> Function:
    return lambda **x: {"log_prob": function(**x)["log_prob"]}
