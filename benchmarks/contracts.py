"""The errors of TRL's and Liger's functions and of ours, called in the same way (reval_kernels.compat).

    python -m benchmarks.contracts

Prints the tables of docs/coming_from.md: for each situation the largest error of log-prob and entropy in nats, and of
the gradient over its largest true entry, for random upstream gradients of both. The truth is plain PyTorch in float64.
TRL's and Liger's PyTorch functions run as they are, and TRL's Triton kernel in Triton's interpreter: this shows its
arithmetic on a machine without a GPU, not its speed.
`make bench` installs TRL and Liger; without them, only our column has numbers.

Letters: N tokens, V words, D features.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from reval_kernels.compat import liger, trl_kernels, trl_utils

N, V, D = 64, 4096, 64
Function = Callable[..., tuple[Tensor, ...]]
TABLE = "| {} |"


def load(module: str, name: str) -> Callable | None:
    """A function of another library, or None if it is not there. An import may fail with any exception."""
    try:
        found = getattr(__import__(module, fromlist=[name]), name)
    except Exception:
        return None
    return getattr(found, "apply", found)


# --- situations -----------------------------------------------------------------------------------------------------


def situations() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Name, logits [N, V] as the functions get them, the same logits in float64, actions [N]."""
    logits, actions = torch.randn(N, V) * 4, torch.randint(V, (N,))
    grid = (logits * 8).round() / 8
    narrow, some, block = logits.bfloat16(), logits.clone(), logits.clone()
    some[:, ::2], block[:, :1024] = -torch.inf, -torch.inf
    yield "float32 logits", logits, logits.double(), actions
    yield "bfloat16 logits", narrow, narrow.double(), actions
    yield "float64 logits", logits.double(), logits.double(), actions
    yield "every second word at -inf", some, some.double(), actions | 1
    yield "the first 1,024 words at -inf", block, block.double(), actions.clamp(min=1024)
    yield "1e4 added to all logits", grid + 1e4, grid.double(), actions


def head_situations() -> Iterator[tuple[str, list[Tensor], list[Tensor], Tensor]]:
    """Name, (hidden [N, D], weight [V, D], bias [V]) as the functions get them, the same in float64, targets [N]."""
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D) / 2, torch.zeros(V)
    targets = torch.randint(V, (N,))
    grid = [(x * 8).round() / 8 for x in (hidden, weight, bias)]
    for name, given in (
        ("float32", [hidden, weight, bias]),
        ("bfloat16 hidden states and head", [x.bfloat16() for x in (hidden, weight, bias)]),
        ("float64", [x.double() for x in (hidden, weight, bias)]),
    ):
        yield name, given, [x.double() for x in given], targets
    impossible = bias.clone()
    impossible[::2] = -torch.inf
    given = [hidden, weight, impossible]
    yield "every second word at -inf (bias)", given, [x.double() for x in given], targets | 1
    yield "1e4 added to all logits (bias)", [*grid[:2], grid[2] + 1e4], [x.double() for x in grid], targets


# --- errors ---------------------------------------------------------------------------------------------------------


def plain(logits: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy; a word at -inf adds nothing to the entropy."""
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, actions[:, None])[:, 0], -(log_p.exp() * log_p.where(log_p > -torch.inf, 0)).sum(-1)


def results(function: Function, inputs: list[Tensor], actions: Tensor, by: list[Tensor]) -> list[Tensor]:
    """Log-prob, entropy, and the gradient of the first input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, actions)[:2]
    cotangents = [g.to(x.dtype) for g, x in zip(by, out, strict=True)]
    return [*(x.detach() for x in out), torch.autograd.grad(out, leaves[:1], cotangents)[0]]


def errors(function: Function | None, definition: Function, given: list[Tensor], wide: list[Tensor], *rest) -> str:
    """The cell of one function: its errors and the dtype of its outputs."""
    if function is None:
        return "not installed"
    truth, found = results(definition, wide, *rest), results(function, given, *rest)
    scales = [torch.ones(()), torch.ones(()), truth[2].abs().max()]
    each = [float(((x.double() - y).abs() / s).max()) for x, y, s in zip(found, truth, scales, strict=True)]
    dtypes = {str(x.dtype).removeprefix("torch.") for x in found[:2]}
    return " / ".join("NaN" if e != e else f"{e:.0e}" for e in each) + f", {' and '.join(sorted(dtypes))}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(TABLE.format(" | ".join(line)) for line in lines)


def head_function(apply: Callable | None) -> Function | None:
    """TRL's chunked head with its trainers' chunk size, as a function of (hidden, weight, bias, targets)."""
    return apply and (lambda h, w, b, t: apply(h, w, b, t, 1.0, 32768, None, 1.0, ("entropy",)))


def scaled_function(apply: Callable | None) -> Function | None:
    """Liger's function, which has no bias, as a function of (hidden, weight, targets). It returns -log-prob."""
    return apply and (lambda h, w, t: (lambda nll, entropy: (-nll, entropy))(*apply(h, w, t, return_entropy=True)))


def main() -> None:
    rows_of = "trl.trainer.utils:selective_log_softmax_and_entropy", "trl.kernels:selective_log_softmax_and_entropy"
    their_rows = [load(*name.split(":")) for name in rows_of]
    their_head = head_function(load("trl.kernels", "ChunkedLogProbFunction"))
    their_loss = scaled_function(load("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction"))
    torch.manual_seed(0)
    by = [torch.randn(N), torch.randn(N)]
    rows = []
    for name, logits, wide, actions in situations():
        functions = [trl_utils.selective_log_softmax_and_entropy, *their_rows]
        rows.append([name, *(errors(f, plain, [logits], [wide], actions, by) for f in functions)])
    print("From logits:\n")
    print(table(["", "ours", "TRL, PyTorch", "TRL's row kernel"], rows))
    heads = []
    for name, given, wides, targets in head_situations():
        ours = head_function(trl_kernels.ChunkedLogProbFunction.apply)
        cells = [errors(f, plain_head, given, wides, targets, by) for f in (ours, their_head)]
        loss = "no bias"
        if "bias" not in name:
            ours_scaled = scaled_function(liger.LigerFusedLinearScaledCrossEntropyFunction.apply)
            mine, theirs = (errors(f, plain_head, given[:2], wides[:2], targets, by) for f in (ours_scaled, their_loss))
            assert mine == cells[0], "our two functions are one computation"
            loss = theirs
        heads.append([name, *cells, loss])
    print("\nFrom hidden states and head:\n")
    print(table(["", "ours", "TRL's chunked head, PyTorch", "Liger's scaled cross entropy, PyTorch"], heads))


def plain_head(hidden: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    """`plain` of (hidden, weight, targets) or (hidden, weight, bias, targets)."""
    *bias, targets = rest
    return plain(hidden @ weight.T + (bias[0] if bias else 0), targets)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    warnings.simplefilter("ignore")
    with contextlib.suppress(KeyboardInterrupt):
        main()
