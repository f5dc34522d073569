"""The results of a check of a GPU machine, as JSON and as a Markdown page, made from the records of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .. import report
from ..suite import Row
from .bars import bars
from .record import DONE, NOT_RUN

Part = dict[str, Any]


def write(folder: Path, name: str, where: dict[str, Any], parts: list[Part], interrupted: bool) -> list[Path]:
    """Write <name>.json and <name>.md. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, held = rows_of(parts), bars(rows_of(parts))
    sections = {
        "stamp": [where],
        "parts": [{k: v for k, v in part.items() if k not in ("rows", "rates")} for part in parts],
        "rates": [rate for part in parts for rate in part.get("rates", [])],
        "bars": [asdict(bar) | {"verdict": bar.verdict} for bar in held],
        "rows": [row.as_json() for row in rows],
        "interrupted": [interrupted],
    }
    data, page = folder / f"{name}.json", folder / f"{name}.md"
    data.write_text(report.as_json(sections))
    page.write_text("\n".join(markdown(where, parts, rows, interrupted)) + "\n")
    return [data, page]


def rows_of(parts: list[Part]) -> list[Row]:
    names = {f.name for f in fields(Row)}
    return [Row(**{k: v for k, v in row.items() if k in names}) for part in parts for row in part.get("rows", [])]


def markdown(where: dict[str, Any], parts: list[Part], rows: list[Row], interrupted: bool) -> Iterator[str]:
    yield f"# GPU check: {where['device']}\n"
    yield "Made by `tools/gpu_check.py`; how to read it: docs/benchmarks.md.\n"
    if interrupted:
        yield "**Interrupted: some of it was not measured.**\n"
    yield from report.stamp_list(where)
    yield "\n## Parts\n\n| part | status | seconds | of | |\n|---|---|--:|--:|---|"
    for part in parts:
        left = f"{len(part['left'])} cases were not reached" if part.get("left") else ""
        clocks = ", ".join(f"{k} {v}" for k, v in part.get("clocks", {}).items())
        note = "; ".join(filter(None, [part.get("reason", ""), left, clocks])).replace("|", "\\|")
        yield f"| {part['part']} | {part['status']} | {part.get('seconds', '')} | {part.get('budget', '')} | {note} |"
    for part in parts:
        yield from _programs(part)
    rates = [rate for part in parts for rate in part.get("rates", [])]
    if rates:
        yield "\n## Rates of the device\n\n| | median | quartiles | runs |\n|---|--:|--:|--:|"
        for r in rates:
            spread = f"{r['q1']:.4g} to {r['q3']:.4g}"
            yield f"| {r['name']} | {r['median']:.4g} {r['unit']} | {spread} | {r['runs']} |"
    if rows:
        yield "\n## The bars\n"
        yield from report.bar_table(bars(rows))
    for title, case in report.cases(rows):
        yield f"\n## {title}\n"
        yield from report.case_table(case)
    for part in parts:
        for case in part.get("left", []):
            yield f"- {part['part']}: not reached: {case}"


def _programs(part: Part) -> Iterator[str]:
    """What the parts found that run other programs, and the end of what failed."""
    if found := part.get("tests"):
        counts = ", ".join(f"{found[k]} {k}" for k in ("passed", "failed", "errors", "skipped") if k in found)
        yield f"\n## Tests\n\n{counts or 'pytest wrote no report'}"
        yield from (f"- {name}" for name in found.get("names", []))
        yield from _output(found)
    if found := part.get("race"):
        without = "" if found["tool"] else ", without compute-sanitizer"
        yield f"\n## Racecheck\n\nstatus {found['status']}{without}. {' '.join(found['summary'])}"
        yield from _output(found)
    if found := part.get("trainer"):
        yield "\n## Trainer\n\nTimes are in seconds.\n"
        yield "| config | iteration | loss | step | rollout | reference | update |\n|---|--:|--:|--:|--:|--:|--:|"
        for run in found:
            for i in run.get("iterations", []):
                numbers = (i[k] for k in ("loss", "step_time", "time/rollout", "time/reference", "time/update"))
                shown = " | ".join("" if n is None else f"{n:.4g}" for n in numbers)
                yield f"| {run['config']} | {i['iteration']} | {shown} |"
        yield ""
        for run in found:
            if why := run.get("skipped") or run.get("problem"):
                yield f"- {run['config']}: {why}"
            yield from _output(run)
    if found := part.get("vllm"):
        yield from _vllm(found)
    if found := part.get("sizes"):
        yield "\n## Memory of a learner\n\nPeaks in GiB, times in seconds.\n"
        yield "| case | phase | measured | estimated | off by | time | model made in |\n|---|---|--:|--:|--:|--:|--:|"
        for row in found:
            if why := row.get("skipped"):
                yield f"| {row['name']} | not run: {why} | | | | | |"
                continue
            peaks = f"{row['measured'] / 2**30:.2f} | {row['estimated'] / 2**30:.2f} | {row['error']:+.1%}"
            times = f"{row['seconds']:.2f} | {row['model_seconds']:.1f}"
            yield f"| {row['name']} | {row['phase']} | {peaks} | {times} |"
    if found := part.get("generation"):
        yield "\n## Generation\n"
        yield "| call | responses | longest | tokens | seconds | tokens/s |\n|---|--:|--:|--:|--:|--:|"
        for row in found["rows"]:
            speed = f"{row['tokens']} | {row['seconds']:.2f} | {row['tokens_per_second']:.0f}"
            yield f"| {row['name']} | {row['responses']} | {row['longest']} | {speed} |"
        yield f"\nThe second call: at least {found['at_least']} tokens/s: {'met' if found['met'] else 'missed'}."
        yield from (f"- warning: {text}" for text in found["warnings"])
    if text := part.get("traceback"):
        yield f"\n## Error in {part['part']}\n\n```\n{text.rstrip()}\n```"


def _vllm(runs: list[dict[str, Any]]) -> Iterator[str]:
    yield "\n## vLLM\n\nTimes are in seconds, memory is GiB of the GPU that all processes use.\n"
    yield "| mode, sleep | start | syncs | tokens/s | mismatch mean | mismatch max | memory |\n|---|--:|--|--|--|--|--|"
    for run in runs:
        if "probe" in run:
            means, largest = ([p[f"rollout/mismatch_{k}"] for p in run["probe"]] for k in ("mean", "max"))
            columns = (run["sync"], run["speed"], means, largest)
            shown = " | ".join(", ".join(f"{x:.4g}" for x in column) for column in columns)
            memory = ", ".join(f"{k} {v}" for k, v in run["memory"].items())
            yield f"| {run['mode']}, {run['sleep']} | {run['start']:.3g} | {shown} | {memory} |"
    yield ""
    for run in runs:
        notes = filter(None, [run.get("vllm"), run.get("problem")])
        yield f"- {run['mode']}, {run['sleep']}: {', '.join(notes)}"
        yield from _output(run)


def _output(found: dict[str, Any]) -> Iterator[str]:
    if found.get("tail"):
        yield "\n```\n" + "\n".join(found["tail"]) + "\n```"


def ok(part: Part) -> bool:
    """Whether the part is done, or cannot run on this machine, and none of our providers was wrong in it."""
    ours = [row for row in part.get("rows", []) if row["provider"].startswith("triton")]
    return part["status"] in (DONE, NOT_RUN) and all(row["status"] not in ("wrong", "failed") for row in ours)
