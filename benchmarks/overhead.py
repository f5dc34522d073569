"""python -m benchmarks.overhead: the time of calls on one trajectory of 8 tokens, forward and backward, on the CPU.

The work of such a call is next to nothing, so its time is what a call costs whatever its size: checks of arguments,
Python, torch's dispatcher and autograd. Plain PyTorch computes the same in the same run.

Each sample is the mean of 5 calls. The functions and providers take turns in an order that changes with every round.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import reval_kernels
from reval_kernels import TokenValues

from .ops import BETA
from .providers import eager_bellman_loss, eager_linear_token_values, eager_token_values
from .report import file_name, stamp
from .timing import summary

LENGTH, VOCABULARY, WIDTH = 8, 16, 4
CALLS = 5
"""The calls of one sample."""
PEER = "torch eager"


class Inputs(NamedTuple):
    logits: Tensor
    hidden: Tensor
    weight: Tensor
    q: Tensor
    v: Tensor
    log_prob: Tensor
    actions: Tensor
    reference: TokenValues
    returns: Tensor
    rewards: Tensor


WRT = {
    "token_values": ("logits",),
    "linear_token_values": ("hidden", "weight"),
    "td_targets": ("q", "v"),
    "bellman_loss": ("v", "log_prob"),
    "reval_loss": ("logits",),
    "linear_reval_loss": ("hidden", "weight"),
}
"""The public functions, and the inputs for which the backward computes a gradient."""


def inputs() -> Inputs:
    torch.manual_seed(0)
    shapes = [(1, LENGTH, VOCABULARY), (1, LENGTH, WIDTH), (VOCABULARY, WIDTH), *[(1, LENGTH)] * 3]
    logits, hidden, weight, q, v, log_prob = (torch.randn(shape, requires_grad=True) for shape in shapes)
    actions, reference = torch.randint(VOCABULARY, (1, LENGTH)), TokenValues(*torch.randn(3, 1, LENGTH).unbind())
    return Inputs(logits, hidden, weight, q, v, log_prob, actions, reference, torch.randn(1), torch.ones(1))


Numbers = dict[str, Callable[[], Tensor]]
"""For each function, a call that returns a number: the loss, or the sum of an output."""


def ours(x: Inputs, backend: str) -> Numbers:
    values, outcome = TokenValues(x.q, x.v, x.log_prob), (x.returns, x.rewards)
    own: dict[str, Any] = {"backend": backend}
    loss = own | {"beta": BETA}
    r = reval_kernels
    return {
        "token_values": lambda: r.token_values(x.logits, x.actions, **own).log_prob.sum(),
        "linear_token_values": lambda: r.linear_token_values(x.hidden, x.weight, x.actions, **own).log_prob.sum(),
        "td_targets": lambda: r.td_targets(values, x.reference, x.rewards, **loss).error.sum(),
        "bellman_loss": lambda: r.bellman_loss(values, *outcome, **loss).loss,
        "reval_loss": lambda: r.reval_loss(x.logits, x.actions, *outcome, **loss).loss,
        "linear_reval_loss": lambda: r.linear_reval_loss(x.hidden, x.weight, x.actions, *outcome, **loss).loss,
    }


def eager(x: Inputs) -> Numbers:
    """The same in plain PyTorch, as most people write it."""

    def error() -> Tensor:
        later, later_ref = (F.pad(v[:, 1:], (0, 1)) for v in (x.v, x.reference.v))
        outcome = F.pad(x.rewards[:, None] / BETA, (LENGTH - 1, 0))
        return x.q - (x.reference.q - later_ref + outcome + later)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return eager_bellman_loss(**values, returns=x.returns, rewards=x.rewards)["loss"]

    def values() -> dict[str, Tensor]:
        return eager_token_values(x.logits, x.actions)

    def linear_values() -> dict[str, Tensor]:
        return eager_linear_token_values(x.hidden, x.weight, x.actions)

    return {
        "token_values": lambda: values()["log_prob"].sum(),
        "linear_token_values": lambda: linear_values()["log_prob"].sum(),
        "td_targets": lambda: error().sum(),
        "bellman_loss": lambda: loss({"q": x.q, "v": x.v, "log_prob": x.log_prob}),
        "reval_loss": lambda: loss(values()),
        "linear_reval_loss": lambda: loss(linear_values()),
    }


def with_gradients(x: Inputs, function: str, number: Callable[[], Tensor]) -> list[Tensor]:
    """One call, forward and backward."""
    out = number()
    return [out.detach(), *torch.autograd.grad(out, [getattr(x, name) for name in WRT[function]])]


def measure(samples: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a call, by function and provider."""
    x = inputs()
    backends = [name for name in ("cpu", "portable") if reval_kernels.backends()[name].available]
    providers = {PEER: eager(x)} | {name: ours(x, name) for name in backends}
    taken: dict[str, dict[str, list[float]]] = {function: {name: [] for name in providers} for function in WRT}
    order = [(function, name) for function in taken for name in providers]
    for sample in range(-1, samples):  # the first round makes caches, and is not kept
        random.shuffle(order)
        for function, name in order:
            number, start = providers[name][function], time.perf_counter()
            for _ in range(CALLS):
                with_gradients(x, function, number)
            if sample >= 0:
                taken[function][name].append((time.perf_counter() - start) / CALLS)
    return taken


def table(seconds: dict[str, dict[str, list[float]]]) -> list[str]:
    """The table, in Markdown."""
    lines = ["| function | provider | median us | quartiles | over eager |", "| --- | --- | --: | --: | --: |"]
    for function, by_provider in seconds.items():
        eager_median = summary(by_provider[PEER])["median"]
        for provider, taken in by_provider.items():
            s = summary(taken)
            low, middle, high = (f"{s[k] * 1e6:.1f}" for k in ("q1", "median", "q3"))
            share = f"{s['median'] / eager_median:.2f}"
            lines.append(f"| {function} | {provider} | {middle} | {low} to {high} | {share} |")
    return lines


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=300, help="of each function and provider [300: half a minute]")
    parser.add_argument("--output", type=Path, help="a folder for the results; without it they are only printed")
    args = parser.parse_args(words)
    if args.samples < 1:
        parser.error(f"--samples must be positive, got {args.samples}")
    where = stamp(torch.device("cpu"))
    seconds = measure(args.samples)
    print("\n".join(table(seconds)))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f"{file_name(where)}-overhead.json"
        path.write_text(json.dumps({"stamp": where, "seconds": seconds}) + "\n")
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
