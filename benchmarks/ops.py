"""The timed ops: inputs, formulas for bytes and FLOPs, the limit of each op, and the true results in float64.

Letters: B trajectories, T tokens of each, N = B x T tokens, V vocabulary, D width, s bytes of an entry. A *case* is an
op, a shape and a dtype.

A multiplication, an addition, a comparison and an exponential count as one FLOP each. Bytes count the traffic on the
memory bus when no cache keeps anything: each input is read as often as the computation needs it, each output is written
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Function = Callable[..., Tensors]
"""A provider's forward: keyword arguments are input tensors, the result maps names to output tensors."""

BETA = 0.5


class Shape(NamedTuple):
    """The size of a case."""

    trajectories: int  # B
    length: int  # T
    vocabulary: int = 0  # V
    width: int = 0  # D

    @property
    def tokens(self) -> int:
        return self.trajectories * self.length

    def __str__(self) -> str:
        sizes = [f"N = {self.tokens:,}"] if self.vocabulary else [f"B = {self.trajectories:,}", f"T = {self.length:,}"]
        sizes += [f"D = {self.width:,}"] if self.width else []
        return ", ".join(sizes + ([f"V = {self.vocabulary:,}"] if self.vocabulary else []))


@dataclass(frozen=True)
class Op:
    """One computation to time."""

    name: str
    family: str
    """The family of provider functions that compute this op."""
    inputs: Callable[[Shape, torch.dtype, torch.device], Tensors]
    bytes: Callable[[Shape, int], int]
    """Memory traffic, from the shape and the bytes of an entry."""
    flops: Callable[[Shape], int]
    formula: str
    """`bytes` and `flops` in words."""
    limit: Callable[[Tensors], Callable[[], object]]
    """From the inputs to a function that does the work no implementation can avoid. Its time is the limit."""
    limit_name: str
    wrt: tuple[str, ...] = ()
    """The inputs that get a gradient. If empty, the op is forward only and runs under no_grad."""
    upstream: tuple[str, ...] = ()
    """The outputs that the backward starts from. A provider may lack some of them."""
    chunk: int = 1 << 30
    """Rows or trajectories for which `truth` computes float64 results at a time."""

    def run(self, function: Function, x: Tensors) -> Tensors:
        """The outputs of `function`, and the gradients under the names "d <input>"."""
        arguments = {k: t for k, t in x.items() if not k.startswith("d ")}
        if not self.wrt:
            with torch.no_grad():
                return function(**arguments)
        leaves = {k: arguments[k].detach().requires_grad_() for k in self.wrt}
        out = function(**arguments | leaves)
        sources = [k for k in self.upstream if k in out]
        cotangents = [x[f"d {k}"].to(out[k].dtype) if f"d {k}" in x else None for k in sources]
        gradients = torch.autograd.grad([out[k] for k in sources], list(leaves.values()), cotangents)
        return {k: t.detach() for k, t in out.items()} | dict(zip((f"d {k}" for k in leaves), gradients, strict=True))

    def truth(self, definition: Function, x: Tensors) -> Tensors:
        """The true outputs: `run` in float64, `chunk` rows or trajectories at a time so that the results fit in memory.

        Every piece gets the whole weight, and the weight's gradients of all pieces are summed. A loss is a mean over
        trajectories, so a piece's loss and gradients are divided by the number of pieces.
        """
        whole = {k: wide(x[k]) for k in {"weight"} & x.keys()}
        rows = len(next(t for k, t in x.items() if k not in whole))
        count = -(-rows // self.chunk)
        if rows % count:
            raise ValueError(f"{self.name}: {rows} rows do not divide into {count} equal pieces")
        pieces = {k: t.chunk(count) for k, t in x.items() if k not in whole}
        out: dict[str, list[Tensor]] = {}
        total: Tensors = {}
        for i in range(count):
            for k, t in self.run(definition, whole | {k: wide(p[i]) for k, p in pieces.items()}).items():
                mean = t / count if t.dim() == 0 or (k.startswith("d ") and "loss" in self.upstream) else t
                if t.dim() == 0 or k.removeprefix("d ") in whole:
                    total[k] = total[k] + mean if k in total else mean
                else:
                    out.setdefault(k, []).append(mean)
        return total | {k: torch.cat(tensors) for k, tensors in out.items()}


def wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def error(out: Tensors, truth: Tensors) -> float:
    """The largest relative error of any output; inf for a NaN, a missing output or a wrong shape.

    The error of one output is the larger of two ratios:
    - the largest error of an entry, over the largest magnitude of an entry;
    - the sum of all errors, over the sum of all magnitudes.

    The second ratio is for gradients of logits. Their entries at the actions are far larger than all other entries. A
    gradient without the other entries is wrong, and its first ratio is still only 1%.
    """
    if out.keys() != truth.keys():
        return math.inf
    worst = 0.0
    for k, t in truth.items():
        if out[k].shape != t.shape:
            return math.inf
        pieces = zip(*(x.flatten().split(1 << 24) for x in (out[k], t)), strict=True)  # a float64 copy is large
        apart = [((d := (mine.double() - true).abs()).max(), d.sum()) for mine, true in pieces]
        largest, whole = torch.tensor(apart, dtype=torch.float64).unbind(1)
        unit = torch.stack([t.abs().max(), t.abs().sum()]).clamp(min=torch.finfo(t.dtype).tiny)
        relative = float((torch.stack([largest.max(), whole.sum()]).to(unit.device) / unit).max())
        worst = math.inf if math.isnan(relative) else max(worst, relative)
    return worst


# --- inputs ----------------------------------------------------------------------------------------------------------


def _generator(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def logits_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """logits [N, V] with standard deviation 2, actions [N], random upstream gradients of v and log_prob [N]."""
    g = _generator(device)
    logits = torch.empty(shape.tokens, shape.vocabulary, dtype=dtype, device=device).normal_(0, 2, generator=g)
    d_v, d_log_prob = torch.randn(2, shape.tokens, device=device, generator=g)
    actions = torch.randint(shape.vocabulary, (shape.tokens,), device=device, generator=g)
    return {"logits": logits, "actions": actions, "d v": d_v, "d log_prob": d_log_prob}


def head_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """hidden [B, T, D], weight [V, D], actions [B, T]; the logits have standard deviation 2."""
    g = _generator(device)
    deviation = 2 / shape.width**0.5
    hidden = torch.randn(shape.trajectories, shape.length, shape.width, device=device, generator=g).to(dtype)
    weight = torch.empty(shape.vocabulary, shape.width, dtype=dtype, device=device).normal_(0, deviation, generator=g)
    actions = torch.randint(shape.vocabulary, hidden.shape[:2], device=device, generator=g)
    return {"hidden": hidden, "weight": weight, "actions": actions}


def linear_values_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """`head_inputs`, and random upstream gradients of v and log_prob [B, T]."""
    g = _generator(device, seed=1)  # with seed 0 the gradients would be the first hidden states
    d_v, d_log_prob = torch.randn(2, shape.trajectories, shape.length, device=device, generator=g)
    return head_inputs(shape, dtype, device) | {"d v": d_v, "d log_prob": d_log_prob}


def loss_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """`head_inputs`, returns [B] of a reference near the policy, and rewards [B] of 0 and 1."""
    value = math.log(shape.vocabulary) + 2  # logsumexp of logits with standard deviation 2
    return head_inputs(shape, dtype, device) | outcomes(shape, value * (1 - shape.length), device)


def values_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """q, v, log_prob [B, T], returns [B] and rewards [B]. All are float32, as backends return values."""
    q = torch.randn(shape.trajectories, shape.length, device=device, generator=_generator(device))
    v = 12 + q / 4
    return {"q": q, "v": v, "log_prob": q - v} | outcomes(shape, 12.0 * (1 - shape.length), device)


def outcomes(shape: Shape, returns: float, device: torch.device) -> Tensors:
    g = _generator(device)
    spread = torch.randn(shape.trajectories, device=device, generator=g)
    rewards = torch.randint(2, (shape.trajectories,), device=device, generator=g).float()
    return {"returns": returns + spread, "rewards": rewards}


# --- limits ----------------------------------------------------------------------------------------------------------


def read(x: Tensor) -> Callable[[], object]:
    """One streaming read of x: torch sums float32, bf16 and fp16 at the speed of memory.

    On a GPU, two 16-bit entries are summed as one float32: the sum is of no use, but nothing is converted.
    """
    if x.device.type == "cuda" and x.element_size() == 2 and x.numel() % 2 == 0 and x.is_contiguous():
        x = x.flatten().view(torch.float32)
    return lambda: x.sum()


def read_twice_write_once(x: Tensor) -> Callable[[], object]:
    once, out = read(x), torch.empty_like(x)
    return lambda: (once(), out.copy_(x))


def matmuls(x: Tensors, *of: str) -> Callable[[], object]:
    """The bare matmuls named in `of`, one after another. The outputs are allocated beforehand.

    "logits" = hidden @ weight.T; "d hidden" = g @ weight; "d weight" = g.T @ hidden, with a random g like the logits.
    """
    hidden, weight = x["hidden"].flatten(0, 1), x["weight"]
    logits, d_hidden, d_weight = hidden.new_empty(len(hidden), len(weight)), hidden.clone(), weight.clone()
    g = logits if set(of) == {"logits"} else torch.randn(logits.shape, device=hidden.device).to(hidden.dtype)
    by_name = {
        "logits": lambda: torch.mm(hidden, weight.T, out=logits),
        "d hidden": lambda: torch.mm(g, weight, out=d_hidden),
        "d weight": lambda: torch.mm(g.T, hidden, out=d_weight),
    }
    return lambda: [by_name[name]() for name in of]


# --- the registry ----------------------------------------------------------------------------------------------------

OPS = {
    op.name: op
    for op in (
        Op(
            "token_values forward",
            "token_values",
            logits_inputs,
            # read the logits once and the actions; write q, v and log_prob
            bytes=lambda n, s: n.tokens * n.vocabulary * s + n.tokens * (8 + 3 * 4),
            # for each entry: compare with the maximum, subtract the maximum, exponentiate, add
            flops=lambda n: 4 * n.tokens * n.vocabulary,
            formula="bytes N V s + 20 N; FLOPs 4 N V",
            limit=lambda x: read(x["logits"]),
            limit_name="one read of the logits: sum",
            chunk=64,
        ),
        Op(
            "token_values forward+backward",
            "token_values",
            logits_inputs,
            # N V entries: two reads and a write. A token: action twice, 3 outputs, 2 upstream gradients, 2 statistics
            bytes=lambda n, s: 3 * n.tokens * n.vocabulary * s + n.tokens * (2 * 8 + 7 * 4),
            # forward 4; backward: subtract, exponentiate, multiply twice
            flops=lambda n: 8 * n.tokens * n.vocabulary,
            formula="bytes 3 N V s + 44 N; FLOPs 8 N V",
            limit=lambda x: read_twice_write_once(x["logits"]),
            limit_name="two reads and a write: sum and copy_",
            wrt=("logits",),
            upstream=("v", "log_prob"),
            chunk=64,
        ),
        Op(
            "linear_token_values forward",
            "linear_token_values",
            head_inputs,
            bytes=lambda n, s: (n.tokens + n.vocabulary) * n.width * s + n.tokens * (8 + 3 * 4),
            # one matmul, and 4 for each entry of the logits
            flops=lambda n: 2 * n.tokens * n.vocabulary * n.width + 4 * n.tokens * n.vocabulary,
            formula="bytes (N + V) D s + 20 N; FLOPs 2 N V D + 4 N V",
            limit=lambda x: matmuls(x, "logits"),
            limit_name="one bare matmul",
            chunk=1,
        ),
        Op(
            "linear_reval_loss forward+backward",
            "linear_reval_loss",
            loss_inputs,
            # read hidden and weight once, write their gradients once
            bytes=lambda n, s: 2 * (n.tokens + n.vocabulary) * n.width * s + n.tokens * 8,
            # three matmuls, and 8 for each entry of the logits. An implementation that drops the logits does a fourth.
            flops=lambda n: 6 * n.tokens * n.vocabulary * n.width + 8 * n.tokens * n.vocabulary,
            formula="bytes 2 (N + V) D s + 8 N; FLOPs 6 N V D + 8 N V",
            limit=lambda x: matmuls(x, "logits", "d hidden", "d weight"),
            limit_name="three bare matmuls",
            wrt=("hidden", "weight"),
            upstream=("loss",),
            chunk=1,
        ),
        Op(
            "linear_reval_loss of a frozen head forward+backward",
            "linear_reval_loss",
            loss_inputs,
            # read hidden and weight once, write the gradient of hidden
            bytes=lambda n, s: (2 * n.tokens + n.vocabulary) * n.width * s + n.tokens * 8,
            flops=lambda n: 4 * n.tokens * n.vocabulary * n.width + 8 * n.tokens * n.vocabulary,
            formula="bytes (2 N + V) D s + 8 N; FLOPs 4 N V D + 8 N V",
            limit=lambda x: matmuls(x, "logits", "d hidden"),
            limit_name="two bare matmuls",
            wrt=("hidden",),
            upstream=("loss",),
            chunk=1,
        ),
        Op(
            "linear_token_values forward+backward",
            "linear_token_values",
            linear_values_inputs,
            # as the loss; a token: action twice, 3 outputs, 2 upstream gradients
            bytes=lambda n, s: 2 * (n.tokens + n.vocabulary) * n.width * s + n.tokens * (2 * 8 + 5 * 4),
            # as the loss. The upstream gradients come after the forward, so without memory for the logits it is a
            # fourth matmul that makes them again.
            flops=lambda n: 6 * n.tokens * n.vocabulary * n.width + 8 * n.tokens * n.vocabulary,
            formula="bytes 2 (N + V) D s + 36 N; FLOPs 6 N V D + 8 N V",
            limit=lambda x: matmuls(x, "logits", "logits", "d hidden", "d weight"),
            limit_name="four bare matmuls: the logits twice",
            wrt=("hidden", "weight"),
            upstream=("v", "log_prob"),
            chunk=1,
        ),
        Op(
            "bellman_loss forward+backward",
            "bellman_loss",
            values_inputs,
            # read log_prob, write dlog_prob and dv; v is read at first tokens only, which is not counted
            bytes=lambda n, s: 3 * n.tokens * 4,
            flops=lambda n: n.tokens,
            formula="bytes 12 N (always fp32); FLOPs N",
            limit=lambda x: read_twice_write_once(x["log_prob"]),
            limit_name="two reads and a write of N numbers",
            wrt=("v", "log_prob"),
            upstream=("loss",),
        ),
    )
}
