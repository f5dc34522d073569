"""The parts that measure: the rates of the card, the bare matmuls of every head, and the cases of cases.py."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch

from reval.device import Rate, clock_for, nvidia_smi, rates, time_calls

from ..cases import BF16, GPU_SHAPES, gpu_cases
from ..ops import OPS, head_inputs, matmuls
from ..providers import Provider, precisions, providers
from ..suite import Case, Settings, Suite
from .record import Job, Record

HEADS = [name for name, (shape, _) in GPU_SHAPES.items() if shape.width and name != "fp32 head"]


def limits(job: Job, record: Record) -> None:
    """Copy rate, read rate and matmul rate of the device, and the rate of the bare matmuls of each head in bf16."""
    device = torch.device(job.device)
    clock = clock_for(device)
    found: list[dict] = []

    def add(rate: Rate) -> None:
        low, high = rate.quartiles
        found.append({"name": rate.name, "unit": rate.unit, "median": rate.median, "q1": low, "q3": high})
        found[-1]["runs"] = len(rate.seconds)
        record.write(rates=found, clocks=clocks())
        print(f"    {rate.name}: {rate}", flush=True)

    for rate in rates(device, *((2**-10, 64) if job.rehearse else ())):
        add(rate)
    for name in HEADS:
        shape = GPU_SHAPES[name][job.rehearse]
        x = head_inputs(shape, BF16, device)
        one = 2 * shape.tokens * shape.vocabulary * shape.width / 1e12
        add(time_calls(f"matmul into bf16 logits, {shape}", "TFLOP/s", one, matmuls(x, "logits"), clock))
        three = matmuls(x, "logits", "d hidden", "d weight")
        add(time_calls(f"three matmuls, {shape}", "TFLOP/s", 3 * one, three, clock))


def measured(part: str, job: Job, record: Record) -> None:
    """Every case of a part of cases.py, in turn, until the part's time is over."""
    device = torch.device(job.device)
    settings = Settings(device, budget=0.4, least=7, give_up=5.0)
    if job.rehearse:
        settings = Settings(device, budget=0.0, least=1, most=1, memory=False)
    suite = Suite(settings, say=partial(print, flush=True))
    waiting = gpu_cases(part, tiny=job.rehearse)
    try:
        while waiting and time.time() < job.end:
            print(f"  {part}: {job.left:.0f} s left, {len(waiting)} cases: {waiting[0]}", flush=True)
            case = waiting.pop(0)
            suite.run(case, chosen(case, job.rehearse))
            if job.device == "cuda":
                torch.cuda.synchronize()  # raises if a provider has ruined the CUDA context of this process
            record.write(rows=[row.as_json() for row in suite.rows], clocks=clocks())
    finally:  # Ctrl-C keeps what a case has measured
        record.write(rows=[row.as_json() for row in suite.rows], left=[str(case) for case in waiting])


def chosen(case: Case, rehearse: bool) -> list[Provider]:
    """The case's providers. In a rehearsal: without compiled providers, and with our kernels in the interpreter."""
    family = OPS[case.op].family
    named = precisions(family) if case.precision else [p for p in providers(family) if p.name in case.only]
    if not rehearse:
        return named
    named = [p for p in named if not p.compiled]
    return [replace(p, missing=partial(interpreted, p)) if p.name.startswith("triton") else p for p in named]


def interpreted(provider: Provider, device: str) -> str | None:
    """`Provider.missing` of our kernels in a rehearsal: what is there for a GPU also runs in the interpreter."""
    return provider.missing("cuda")


def clocks() -> dict[str, str]:
    """The GPU's clocks, power and temperature right now."""
    return nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
