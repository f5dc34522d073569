"""The peak memory of a learner with random weights, beside the estimate of `reval train --dry-run`.

A case makes the model, its reference and its learner, and takes twice the steps of an iteration that follow generation:
the reference's values, and an update. The first update makes Adam's means, so the second time has the peaks.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from reval.config import Config, load_config
from reval.estimate import PROMPT, memory, total
from reval.learner import Learner
from reval.model.dtypes import with_dtypes
from reval.model.loading import load_model
from reval.model.shapes import shape_of
from reval.reference_policy import ReferencePolicy
from reval.replay import Trajectory

from .record import Job, NotRun, Record

TOLERANCE = 0.15
"""The bar: the estimate is that close to the measured peak."""
REFERENCE, UPDATE = "the reference's values", "an update"


@dataclass(frozen=True, slots=True)
class Size:
    """A case. The batch is two trajectories of the longest length, each a micro-batch."""

    name: str
    settings: tuple[str, ...]
    response: int = 8192
    least: float = 0.0
    """GiB that the device must have."""

    def config(self, device: str) -> Config:
        tokens = self.response + PROMPT
        settings = [f"model.device={device}", f"rollout.max_new_tokens={self.response}", "rollout.prompts=1"]
        settings += ["rollout.responses=2", f"optim.micro_batch_tokens={tokens}", "model.compute_dtype=auto"]
        settings += ["rollout.engine=vllm", "replay.batch_size=2"]  # generation is not measured here
        return with_dtypes(load_config([], [*settings, *self.settings]))


CHECKPOINTED = "model.gradient_checkpointing=true"
SIZES = [
    Size("1.5B", ("model.name=random:Qwen2.5-1.5B", CHECKPOINTED), least=40),
    Size("7B, LoRA", ("model.name=random:Qwen2.5-7B", "model.dtype=bfloat16", "lora.rank=32", CHECKPOINTED), least=30),
    Size(
        "7B, offloaded reference",
        ("model.name=random:Qwen2.5-7B", "model.dtype=bfloat16", "reference.offload=true", CHECKPOINTED),
        least=74,
    ),
]
SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""The config.json of a rehearsal."""


def trajectories(config: Config, vocabulary: int) -> list[Trajectory]:
    """An iteration's trajectories of PROMPT + rollout.max_new_tokens random tokens, with rewards 0 and 1."""
    rng, length = np.random.default_rng(0), PROMPT + config.rollout.max_new_tokens
    mask = np.arange(length) >= PROMPT
    return [
        Trajectory(token_ids=rng.integers(5, vocabulary, length), action_mask=mask, reward=r, score=r, iteration=1)
        for r in [float(i % 2) for i in range(config.trajectories_per_iteration)]
    ]


class Meter:
    """The peak of allocated bytes in each phase. On a GPU torch counts them. On a CPU torch.profiler records every
    allocation after `start`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._profile = (
            None if device.type == "cuda" else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        )
        self._times: dict[str, tuple[int, int]] = {}
        self._peaks: dict[str, int] = {}

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What was allocated before this block does not count on a CPU."""
        if self._profile is None:
            yield
            return
        gc.collect()  # what is freed later would count as negative
        with self._profile:
            yield
        held = sorted(self._held())
        before = held[0][1] - held[0][2]  # an earlier profile of this process left it there
        for name, (start, end) in self._times.items():
            self._peaks[name] = max(size for at, size, _ in held if start <= at <= end) - before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._profile is None:
            gc.collect()
            torch.cuda.reset_peak_memory_stats(self._device)
        start = time.time_ns()
        yield
        if self._profile is None:
            torch.cuda.synchronize(self._device)
            self._peaks[name] = torch.cuda.max_memory_allocated(self._device)
        self._times[name] = start, time.time_ns()

    def results(self) -> tuple[dict[str, int], dict[str, float]]:
        """Bytes and seconds of each phase."""
        return self._peaks, {name: (end - start) / 1e9 for name, (start, end) in self._times.items()}

    def _held(self) -> Iterator[tuple[int, int, int]]:
        """Every allocation: its time in ns, the sum of allocated bytes after it, its own bytes (negative: freed)."""
        recorded: Any = self._profile
        waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
        while waiting:
            event = waiting.pop()
            waiting += event.children
            if event.name == "[memory]":
                yield event.start_time_ns, event.typed[1].total_allocated, event.typed[1].alloc_size


def measure(config: Config) -> tuple[dict[str, int], dict[str, float]]:
    """Peak bytes and seconds of the phases "model", REFERENCE and UPDATE."""
    meter = Meter(torch.device(config.model.device))
    with meter.measuring():
        with meter.phase("model"):
            model, tokenizer = load_model(config.model, config.run.seed, config.lora)
            reference, learner = ReferencePolicy(model, config), Learner(model, config)
        batch = trajectories(config, len(tokenizer))
        reference.annotate(batch)
        learner.update(batch)
        reference.reset()
        with meter.phase(REFERENCE):
            reference.annotate(batch)
        with meter.phase(UPDATE):
            skipped = learner.update(batch)["skipped"]
    assert not skipped, "the rewards give a signal"
    return meter.results()


def estimated(config: Config) -> dict[str, float]:
    """The estimate's bytes for the phases REFERENCE and UPDATE."""
    shape = shape_of(config.model.name)
    assert shape is not None
    sums = {moment: total(items) for moment, items in memory(config, shape, 1).items()}
    reference = sums.pop(REFERENCE)
    del sums["generation"]
    return {REFERENCE: reference, UPDATE: max(sums.values())}


def sizes(job: Job, record: Record) -> None:
    """Every case that fits on the device, and its distance from the estimate."""
    cases, found = SIZES, []
    if job.rehearse:
        folder = job.folder / "shape"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(SHAPE))
        cases = [Size("rehearsal", (f"model.name=random:{folder}", CHECKPOINTED), response=300)]
    room = float("inf") if job.rehearse else torch.cuda.get_device_properties(0).total_memory / 2**30
    for case in cases:
        if case.least > room or time.time() > job.end:
            why = f"needs {case.least:.0f} GiB" if case.least > room else "no time was left"
            found.append({"name": case.name, "skipped": why})
        else:
            print(f"  sizes: {job.left:.0f} s left: {case.name}", flush=True)
            found += compared(case, job.device)
            gc.collect()
            if job.device == "cuda":
                torch.cuda.empty_cache()
        record.write(sizes=found)
    far = [
        f"{row['name']}, {row['phase']}: {row['error']:+.0%}"
        for row in found
        if "error" in row and abs(float(row["error"])) > TOLERANCE
    ]
    if far and not job.rehearse:
        raise AssertionError(f"the estimate is further than {TOLERANCE:.0%} from the peak: {'; '.join(far)}")
    if all("skipped" in row for row in found):
        raise NotRun("; ".join(f"{row['name']}: {row['skipped']}" for row in found))


def compared(case: Size, device: str) -> list[dict[str, Any]]:
    """A row for each phase with an estimate."""
    config = case.config(device)
    peaks, seconds = measure(config)
    return [
        {
            "name": case.name,
            "phase": phase,
            "measured": peaks[phase],
            "estimated": size,
            "error": size / peaks[phase] - 1,
            "seconds": seconds[phase],
            "model_seconds": seconds["model"],
        }
        for phase, size in estimated(config).items()
    ]
