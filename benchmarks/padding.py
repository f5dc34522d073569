"""How many tokens the transformer computes for a batch, in each form, over the true ones.

    python -m benchmarks.padding

A batch has 32 prompts with 8 responses each, of log-normal lengths. A true token is a token of a distinct prompt, or of
a response. A padded batch computes each prompt with each response; the last column leaves this out: it counts the
padding alone. No model runs.
"""

from __future__ import annotations

import numpy as np
import torch

from reval.batching import Form, MicroBatch, plan
from reval.config import Config
from reval.distributed import World
from reval.replay import Trajectory

CASES = {  # median and largest length of a response, tokens of a prompt
    "median 64, longest 512": (64, 512, 40),
    "median 600, longest 8192": (600, 8192, 120),
}


def batch(median: int, longest: int, prompt: int, seed: int = 0) -> list[Trajectory]:
    """32 x 8 trajectories. The spread of the logarithm makes the longest of them `longest`."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(32, 8))
    lengths = np.exp(np.log(median) + normal * np.log(longest / median) / normal.max()).astype(int)
    out = []
    for row in lengths:
        start = rng.integers(0, 50_000, rng.integers(prompt // 2, 2 * prompt))
        for length in row:
            ids = np.concatenate([start, rng.integers(0, 50_000, max(length, 1))])
            mask = np.arange(len(ids)) >= len(start)
            out.append(Trajectory(token_ids=ids, action_mask=mask, reward=0.0, score=0.0, iteration=0))
    return out


class Other(World):
    """One of several processes; the others need no more micro-batches than this one."""

    def gather(self, item):  # type: ignore[no-untyped-def]
        return [item]


def computed(micros: list[MicroBatch]) -> int:
    return sum(micro.batch.tokens.numel() for micro in micros)


def report(trajectories: list[Trajectory]) -> list[str]:
    """One row of the table for each form."""
    device, budget = torch.device("cpu"), Config().optim.micro_batch_tokens
    alone = sum(len(t) - 1 for t in trajectories)
    prompts = {t.prefix.tobytes(): len(t.prefix) for t in trajectories}
    true = sum(prompts.values()) + alone - sum(len(t.prefix) for t in trajectories)
    out = []
    for form in Form:
        micros = plan(trajectories, World(), device, form, budget)
        eight = [computed(plan(trajectories, Other(rank, 8), device, form, budget)) for rank in range(8)]
        tokens = computed(micros)
        padding = tokens / alone if form is Form.PADDED else 1.0
        out.append(
            f"{form.value:8s} {len(micros):13d} {tokens:9d} {tokens / true:11.3f} {padding:15.3f} "
            f"{sum(eight) / true:18.3f} {max(eight) * 8 / sum(eight):18.3f}"
        )
    return out


def main() -> None:
    for name, case in CASES.items():
        print(
            f"{name}\nform     micro-batches    tokens tokens/true padding, whole 8 processes / true largest/mean share"
        )
        print(*report(batch(*case)), sep="\n")


if __name__ == "__main__":
    main()
