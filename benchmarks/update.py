"""Where the seconds of one update of the demo go.

    python -m benchmarks.update [section.field=value ...]

The batch is like a fresh one of configs/demo.yaml: 8 prompts with 8 responses of 2 to 14 tokens. The seconds are those
of each kind of operation itself, forward and backward, from torch.profiler.
"""

from __future__ import annotations

import sys
import time
from collections import Counter

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from reval.config import load_config
from reval.learner import Learner
from reval.model.dtypes import with_dtypes
from reval.model.loading import load_model
from reval.reference_policy import ReferencePolicy
from reval.replay import Trajectory

KINDS = {  # the first kind with a part of its name in the operation's name
    "head and loss": ("reval_kernels",),
    "matrix products of the layers": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "AdamW": ("adamw",),
    "norm of the gradient, clipping": ("linalg_vector_norm", "_foreach_mul_", "_foreach_norm"),
    "cutting and joining for the attention": ("aten::cat", "split", "aten::narrow", "aten::slice"),
    "all other operations": ("",),
}


def trajectories(tokenizer, seed: int = 0) -> list[Trajectory]:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(8):
        question = f"{rng.integers(10)} + {rng.integers(10)} = Reply with only the number."
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        for _ in range(8):
            ids = np.array([*prompt, *rng.integers(20, 40_000, rng.integers(2, 15))])
            mask = np.arange(len(ids)) >= len(prompt)
            reward = float(rng.integers(2))
            out.append(Trajectory(token_ids=ids, action_mask=mask, reward=reward, score=reward, iteration=1))
    return out


def seconds(recorded: profile) -> Counter[str]:
    """Seconds of each kind, on the GPU if there is one."""
    found: Counter[str] = Counter()
    for event in recorded.key_averages():
        kind = next(kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts))
        found[kind] += (event.self_device_time_total or event.self_cpu_time_total) / 1e6
    return found


def main() -> None:
    config = with_dtypes(load_config(["configs/demo.yaml"], sys.argv[1:]))
    model, tokenizer = load_model(config.model)
    reference, learner = ReferencePolicy(model, config), Learner(model, config)
    batch = trajectories(tokenizer)
    start = time.perf_counter()
    reference.annotate(batch)
    print(f"reference: {time.perf_counter() - start:.2f} s")
    learner.update(batch)  # the first update allocates the optimizer's state
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    start = time.perf_counter()
    with profile(activities=kinds) as recorded:
        learner.update(batch)
    print(f"update, profiled: {time.perf_counter() - start:.2f} s")
    found = seconds(recorded)
    for kind, taken in found.most_common():
        print(f"{taken:8.3f} s {taken / found.total():6.1%}  {kind}")


if __name__ == "__main__":
    main()
