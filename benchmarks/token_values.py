"""token_values on this machine: every backend against plain PyTorch and against one streaming read of the logits.

    make bench        or: python benchmarks/token_values.py --tokens 512 --vocabulary 151936 --dtype float32

What is timed: forward (q, v, log_prob of every token) and forward + backward (dlogits too). Bytes that have to move:
R = tokens x vocabulary x itemsize forward; 2 R + 1 W with the backward. Providers take turns in one process; medians
and quartiles are printed, and nothing is timed when a provider's numbers are not those of the float64 definition.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import reval_kernels
from reval_kernels import reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    logits = torch.randn(args.tokens, args.vocabulary, device=args.device, dtype=dtype)
    actions = torch.randint(args.vocabulary, (args.tokens,), device=args.device)

    providers: dict[str, Callable] = {"torch eager": reference.token_values}
    for name, info in reval_kernels.backends().items():
        if not info.available or (name == "triton" and args.device == "cpu"):
            print(f"{name}: not timed: {info.reason or 'interpreted on a CPU'}")
            continue
        providers[name] = lambda x, a, name=name: reval_kernels.token_values(x, a, backend=name)
    for name, function in providers.items():
        check(name, function, logits[:8], actions[:8])

    print(f"{args.tokens} tokens x {args.vocabulary} words, {args.dtype}, {torch.get_num_threads()} threads")
    report("forward, against one read (sum)", args, providers, logits, actions, backward=False)
    report("forward + backward, against two reads and a write", args, providers, logits, actions, backward=True)


def check(name: str, function: Callable, logits: torch.Tensor, actions: torch.Tensor) -> None:
    """Raise unless log_prob is right to float32 rounding."""
    truth = reference.token_values(logits.double(), actions).log_prob
    error = (function(logits, actions).log_prob.double() - truth).abs().max().item()
    if not error < 1e-4:
        raise SystemExit(f"{name} is wrong by {error}; a wrong result is not timed")


def report(title: str, args: argparse.Namespace, providers: dict, logits, actions, backward: bool) -> None:
    out = torch.empty_like(logits)
    words = logits if logits.dtype == torch.float32 else logits.view(torch.float32)
    runs: dict[str, Callable[[], object]] = {"least traffic": lambda: words.sum()}
    if backward:
        runs["least traffic"] = lambda: (words.sum(), out.copy_(logits))
    for name, function in providers.items():
        runs[name] = lambda function=function: step(function, logits, actions, backward)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if logits.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    least = statistics.median(seconds["least traffic"])
    print(f"\n{title}\n{'provider':<16}{'median ms':>11}{'quartiles':>18}{'ratio':>8}")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"{name:<16}{middle * 1e3:>11.1f}{f'{low * 1e3:.1f} - {high * 1e3:.1f}':>18}{middle / least:>8.2f}")


def step(function: Callable, logits: torch.Tensor, actions: torch.Tensor, backward: bool) -> None:
    if not backward:
        function(logits, actions)
        return
    leaf = logits.detach().requires_grad_()
    values = function(leaf, actions)
    torch.autograd.grad((values.v, values.log_prob), leaf, (values.v, values.q))


if __name__ == "__main__":
    main()
