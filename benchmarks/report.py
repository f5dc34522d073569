"""Writes the results as JSON, as a Markdown page and as plots, stamped with machine, versions and date."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import torch

from reval.device import nvidia_smi

from . import bars as cpu_bars
from .bars import Bar
from .gpu import bars as gpu_bars
from .ops import OPS, Shape
from .suite import LIMIT, Row
from .timing import summary

PACKAGES = (
    *("torch", "triton", "numpy", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "trl"),
    *("transformers", "reval"),
)

GPU_FACTS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def stamp(device: torch.device) -> dict[str, object]:
    """The facts that a measurement depends on: processor or GPU, clocks, threads, load, versions, commit, date."""
    gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        **({"GPU": nvidia_smi(*GPU_FACTS), "CUDA": torch.version.cuda or torch.version.hip} if gpu else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MALLOC_", "REVAL_"))},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load average before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": commit(),
    }


def processor() -> str:
    """The processor's model from /proc/cpuinfo; otherwise Python's `platform` name for it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The variable REVAL_COMMIT, for a copy without git; otherwise the commit of this checkout."""

    def git(*words: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    if given := os.environ.get("REVAL_COMMIT"):
        return given
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def file_name(where: dict[str, object]) -> str:
    """One file name for each device, for example amd-epyc-avx512-2-threads or nvidia-h100-80gb-hbm3."""
    words = [where[k] for k in ("processor", "instructions", "threads")] if where["device"] == "cpu" else ()
    name = " ".join(map(str, words)) + " threads" if words else str(where["device"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(folder: Path, where: dict[str, object], rows: list[Row], interrupted: bool) -> list[Path]:
    """Write <device>.json, <device>.md and the plots. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(where)
    held = bars_of("cpu" if where["device"] == "cpu" else "cuda", rows)
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    sections = {"stamp": [where], "bars": [asdict(bar) for bar in held], "rows": [row.as_json() for row in rows]}
    data.write_text(as_json(sections | {"interrupted": [interrupted]}))
    from .plots import save_bars, save_curves  # imported here, because a GPU check needs no matplotlib

    images = []
    if any(r.status == "timed" and not r.curve for r in rows):
        images.append(save_bars(folder / f"{name}-times.png", rows))
    if any(r.status == "timed" and r.curve for r in rows):
        images.append(save_curves(folder / f"{name}-curves.png", rows))
    page.write_text("\n".join(markdown(where, rows, held, images, interrupted)) + "\n")
    return [data, page, *images]


def bars_of(device: str, rows: list[Row]) -> list[Bar]:
    """The bars for this type of device."""
    return (cpu_bars if device == "cpu" else gpu_bars).bars(rows)


def as_json(sections: dict[str, list]) -> str:
    """An object of lists with one entry on each line, so that git shows differences entry by entry."""
    lists = (f'"{k}": [\n' + ",\n".join(json.dumps(entry) for entry in v) + "\n]" for k, v in sections.items())
    return "{" + ",\n".join(lists) + "}\n"


def markdown(
    where: dict[str, object], rows: list[Row], held: list[Bar], images: list[Path], interrupted: bool
) -> Iterator[str]:
    yield f"# Benchmarks: {where['processor'] if where['device'] == 'cpu' else where['device']}\n"
    yield "Made by `make bench`; how to read it: docs/benchmarks.md.\n"
    if interrupted:
        yield "**Interrupted: some of it was not measured.**\n"
    yield from stamp_list(where)
    if held:
        yield "\n## The bars\n"
        yield from bar_table(held)
    for image in images:
        yield f"\n![{image.stem}]({image.name})"
    for title, case in cases([r for r in rows if not r.curve]):
        yield f"\n## {title}\n"
        yield from case_table(case)
    curves = [r for r in rows if r.curve and r.provider != LIMIT]
    if curves:
        yield "\n## Scaling\n"
        yield from curve_table(curves)


def stamp_list(where: dict[str, object]) -> Iterator[str]:
    for key, value in where.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else value
        yield f"- {key}: {shown}"


def cases(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    def key(row: Row) -> str:
        return f"{row.op}, {row.dtype}, {Shape(**row.shape)}"

    for title, group in groupby(rows, key):
        yield title, list(group)


def bar_table(held: list[Bar]) -> Iterator[str]:
    yield "| op | against | bar | measured | |\n| --- | --- | --- | --- | --- |"
    for bar in held:
        yield f"| {bar.case} | {bar.against} | {bar.bar} | {bar.measured} | {bar.verdict} |"
    yield f"\n{sum(bar.met is True for bar in held)} of {len(held)} met."


def case_table(rows: list[Row]) -> Iterator[str]:
    """The timed providers, fastest first; then the other providers, each with the reason."""
    timed = [r for r in rows if r.status == "timed"]
    timed.sort(key=lambda r: (r.provider != LIMIT, summary(r.seconds)["median"]))
    if timed:
        op, first = OPS[timed[0].op], timed[0]
        yield (
            f"{op.formula}: {first.bytes / 1e6:,.1f} MB, {first.flops / 1e9:,.2f} GFLOP. "
            f"Limit: {op.limit_name}.{_memory_error(rows)}\n"
        )
        wall = any(r.wall for r in timed)
        columns = ["median ms", "quartiles", *(["wall ms"] if wall else []), "runs", "share of limit"]
        columns += ["GB/s", "GFLOP/s", "MiB beyond", "error (torch's)"]
        yield f"| provider | {' | '.join(columns)} | computes |\n|---|{'--:|' * len(columns)}---|"
        limit = next((summary(r.seconds)["median"] for r in timed if r.provider == LIMIT), None)
        for row in timed:
            yield _line(row, limit, wall)
    yield ""
    for row in rows:
        if row.status != "timed" and row.provider != LIMIT:
            yield f"- {row.provider}: {row.status}: {row.reason or 'the run was interrupted'}"


def _line(row: Row, limit: float | None, wall: bool) -> str:
    s = summary(row.seconds)
    spread = f"{s['q1'] * 1e3:.4g} to {s['q3'] * 1e3:.4g}" if s["runs"] > 1 else ""
    if wall:
        spread += f" | {summary(row.wall)['median'] * 1e3:.4g}" if row.wall else " | "
    share = f"{limit / s['median']:.0%}" if limit else ""
    memory = _memory(row) if row.provider != LIMIT else ""
    errors = f"{row.error:.1e} ({row.torch_error:.1e})" if row.error is not None else ""
    rates = [f"{row.bytes / s['median'] / 1e9:.3g}", f"{row.flops / s['median'] / 1e9:.3g}"]
    cells = [row.provider, f"{s['median'] * 1e3:.4g}", spread, str(s["runs"]), share, *rates, memory, errors]
    return f"| {' | '.join(cells)} | {row.computes} |"


def _memory(row: Row) -> str:
    return f"{round(row.memory / 2**20, 1) + 0.0:,.1f}" if row.memory is not None else row.memory_reason


def _memory_error(rows: list[Row]) -> str:
    control = next((r for r in rows if r.provider == LIMIT and r.memory is not None), None)
    return f" Making the outputs alone shows {_memory(control)} MiB beyond them." if control else ""


def curve_table(rows: list[Row]) -> Iterator[str]:
    yield "| op | axis | shape | provider | median ms | MiB beyond |\n|---|---|---|---|--:|--:|"
    for row in sorted(rows, key=lambda r: (r.op, r.dtype, r.curve, r.provider)):
        time = f"{summary(row.seconds)['median'] * 1e3:.4g}" if row.seconds else f"{row.status}: {row.reason}"
        where = f"{row.op}, {row.dtype} | {row.curve} | {Shape(**row.shape)}"
        yield f"| {where} | {row.provider} | {time} | {_memory(row)} |"
