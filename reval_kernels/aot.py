"""Compile every GPU kernel for chosen GPU types, on a machine without a GPU, and report on the machine code.

    python -m reval_kernels.aot [--target sm_90 ...] [--kernel row_forward ...] [--json]

The configurations are those that the launchers use for Qwen's vocabulary (V = 151,936) and width (D = 3584). The
assembler reports registers, stack and shared memory. The other numbers are counted in the machine code:
- load_bits: the width of the narrowest global load in the innermost loops. If no loop has a load: the width of the
  widest load in the kernel. store_bits: the same for stores.
- exp2_per_entry: the exponentials for each vocabulary entry. The entries are those that the same loop loads, or those
  of the program's tile of logits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .contract import BellmanOptions, Level

VOCABULARY, WIDTH = 151_936, 3584


# --- GPUs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    backend: str
    arch: int | str
    warp: int
    shared_block: int
    """Bytes of shared memory that one block may use."""
    shared: int
    """Bytes of shared memory of one processor (SM, CU)."""
    warps: int
    """Warps that one processor can hold."""
    tma: bool = False
    """Whether linear_tiles_tma runs there."""


TARGETS = {
    "sm_80": GPU("cuda", 80, 32, 163 * 1024, 164 * 1024, 64),
    "sm_90": GPU("cuda", 90, 32, 227 * 1024, 228 * 1024, 64, tma=True),
    "sm_100": GPU("cuda", 100, 32, 227 * 1024, 228 * 1024, 64, tma=True),
    "sm_120": GPU("cuda", 120, 32, 99 * 1024, 100 * 1024, 48),
    "gfx942": GPU("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 32),
}


def occupancy(gpu: GPU, registers: int, shared: int, warps: int) -> float:
    """The fraction of a processor's warps that can be resident at once."""
    if gpu.backend == "hip":  # a SIMD has 512 vector registers for each lane, in units of 8, and holds 8 waves
        by_registers = 4 * min(8, 512 // (math.ceil(max(registers, 1) / 8) * 8)) // warps
    else:  # 65,536 registers, in units of 256 for a warp; each block uses 1 KiB of shared memory more
        by_registers = 65536 // (math.ceil(registers * gpu.warp / 256) * 256) // warps
        shared += 1024
    blocks = min(by_registers, gpu.warps // warps, gpu.shared // shared if shared else 32)
    return round(blocks * warps / gpu.warps, 3)


# --- kernels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration. An argument in neither `types` nor `constants` is None (no tensor)."""

    function: Any
    config: dict[str, Any]
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    odd: tuple[str, ...] = ()
    """Arguments whose values are not multiples of 16."""
    entry_bits: int = 0
    """Bits of one vocabulary entry, if a loop loads the entries; else 0."""
    entries: int = 0
    """Logits for each thread in the program's tile, if the kernel computes a tile; else 0."""
    options: dict[str, Any] = field(default_factory=dict)


def _pointers(kind: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{kind}")


def cases(gpu: GPU) -> list[Case]:
    return [*_row_cases(), *_linear_cases(gpu), *_bellman_cases()]


def _row_cases() -> list[Case]:
    from .backends.gpu import common, rows

    block, warps, _, splits = rows.row_blocks(VOCABULARY)
    numbers = _pointers("fp32", "parts q v log_prob entropy row_max log_sum dq dv dlog_prob dentropy")
    sizes = dict.fromkeys("tokens vocabulary inner blocks stride_outer stride_inner".split(), "i32")
    sizes |= {"out_stride_outer": "i32", "out_stride_inner": "i32", "temperature": "fp32", "softcap": "fp32"}
    odd = ("tokens", "inner", "blocks")
    plain = {"stride_v": 1, "out_stride_v": 1, "SOFTCAP": False, "ENTROPY": False, "SPLITS": splits, "BLOCK": block}
    plain |= {"CONTIGUOUS": True}

    def case(function, logits: str, out: str = "", **flags) -> Case:
        types = {"logits": f"*{logits}", "actions": "*i64", **numbers, **sizes}
        config = {"logits": logits, "V": VOCABULARY, "BLOCK": block, **({"out": out} if out else {}), **flags}
        if out:
            types["out"] = f"*{out}"
        if flags.get("mask"):
            types["mask"] = "*i1"
        bits = 16 if logits == "bf16" else 32
        constants = plain | {"NEIGHBOURS": 128 // bits} | {k: v for k, v in flags.items() if k.isupper()}
        if not flags.pop("entropy_gradient", False):
            types.pop("dentropy")
        options = {} if out else common.ASSERTS
        return Case(function, config, types, constants, warps, odd=odd, entry_bits=bits, options=options)

    return [
        case(rows.row_forward, "bf16", mask=True),
        case(rows.row_forward, "bf16", SOFTCAP=True, ENTROPY=True),
        case(rows.row_forward, "fp32"),
        case(rows.row_backward, "bf16", "bf16", mask=True),
        case(rows.row_backward, "bf16", "bf16", SOFTCAP=True),
        case(rows.row_backward, "fp32", "bf16"),
        case(rows.row_backward, "fp32", "fp32"),
    ]


def _linear_cases(gpu: GPU) -> list[Case]:
    from .backends.gpu import common, linear_kernels, linear_launch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    sizes = "rows vocabulary width stride_token stride_word stride_out tiles blocks stride_weights"
    numbers = _pointers("fp32", "parts row_max log_sum entropy dq dv dlog_prob") | {"actions": "*i64"}
    numbers |= dict.fromkeys(sizes.split(), "i32") | {"temperature": "fp32", "softcap": "fp32"}
    odd = ("rows", "tiles", "blocks")

    def case(function: Any, operand: str, out: str = "", **flags) -> Case:
        """`out`: the dtype of the weights or the gradient that the kernel writes."""
        tma = function is linear_kernels.linear_tiles_tma
        softcap = flags.get("SOFTCAP", False)
        tile = linear_launch.tma_tile(softcap) if tma else linear_launch.tile(dtypes[operand], gpu.shared_block)
        types = numbers | _pointers(operand, "hidden weight")
        if tma:
            types |= {"hidden": f"tensordesc<{operand}[{tile.rows},{tile.depth}]>"}
            types |= {"weight": f"tensordesc<{operand}[{tile.words},{tile.depth}]>"}
        if out:
            types["out"] = f"*{out}"
        config = {"operands": operand, "V": VOCABULARY, "D": WIDTH, "tile": [tile.rows, tile.words, tile.depth]}
        config |= {"out": out, **flags} if out else flags
        constants: dict[str, Any] = dict.fromkeys(["SOFTCAP", "ENTROPY", "GRADIENT"], False)
        constants |= {"stride_hidden": 1, "stride_weight": 1}
        constants |= {"PRECISION": "ieee", "EVEN": True, "PROGRAMS": 264, **flags, **tile.constants}
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        entries = tile.rows * tile.words // (warps * gpu.warp)
        return Case(function, config, types, constants, warps, stages, odd, entries=entries)

    words = linear_launch.tile(torch.bfloat16, gpu.shared_block).words
    count, together = math.ceil(VOCABULARY / words), 4096 // words
    padded = 1 << (count - 1).bit_length()
    outputs = _pointers("fp32", "parts q v log_prob entropy row_max log_sum")
    merge = Case(
        common.merge,
        {"parts": count},
        {**outputs, "index": "*i64", "rows": "i32", "count": "i32", "temperature": "fp32", "softcap": "fp32"},
        {"SOFTCAP": False, "ENTROPY": False, "PADDED": padded, "ROWS": max(1, 4096 // padded)},
        4,
        odd=("rows", "count"),
    )
    scaling = [
        Case(
            linear_kernels.scale_weights,
            {"weights": kind, "V": VOCABULARY},
            numbers | _pointers(kind, "weights"),
            {"SOFTCAP": False, "WORDS": words, "TILES": together},
            8,
            odd=odd,
        )
        for kind in dtypes
    ]
    forms = [linear_kernels.linear_tiles, linear_kernels.linear_tiles_tma]
    return [
        *(case(form, "bf16") for form in forms[: 1 + gpu.tma]),
        *(case(form, "bf16", "bf16") for form in forms[: 1 + gpu.tma]),
        *(case(form, "bf16", "bf16", GRADIENT=True) for form in forms[: 1 + gpu.tma]),
        *(case(form, "bf16", "bf16", SOFTCAP=True, ENTROPY=True) for form in forms[: 1 + gpu.tma]),
        case(linear_kernels.linear_tiles, "fp32"),
        *scaling,
        merge,
    ]


def _bellman_cases() -> list[Case]:
    from .backends.gpu import bellman, common

    types = _pointers("fp32", "q v log_prob q_ref v_ref log_prob_ref rewards residual target error endogenous")
    types |= _pointers("fp32", "d_target d_error d_loss d_residual unit_q unit_v unit_log_prob dq dv dlog_prob")
    types |= {"loss": "*fp64", "mask": "*i1", "cu_seqlens": "*i32", "where": "*i64"}
    types |= {"tokens": "i32", "length": "i32", "beta": "fp64", "gamma": "fp32", "weight": "fp64"}

    def case(function, **flags) -> Case:
        constants = {"BLOCK": bellman.BLOCK, **flags}
        return Case(function, flags, types, constants, 4, odd=("tokens", "length"), options=common.ASSERTS)

    options = [bellman.loss_constants(BellmanOptions(beta=1.0, level=level)) for level in Level]
    levels = [case(bellman.loss_kernel, PER_TOKEN=True, **constants) for constants in options]
    others = [bellman.td_kernel, bellman.td_backward_kernel, bellman.loss_backward_kernel]
    return [*levels, *(case(k) for k in others)]


# --- compiling and reading ------------------------------------------------------------------------------------------


def report(target: str, case: Case) -> dict[str, Any]:
    """Compile one case for one target. The result has the keys that `--json` prints."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    gpu, names = TARGETS[target], case.function.arg_names
    constants = {n: case.constants.get(n) for n in names if n in case.constants or n not in case.types}
    signature = {n: "constexpr" if n in constants else case.types[n] for n in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, n in enumerate(names)
        if signature[n].startswith("*") or (signature[n] in ("i32", "i64") and n not in case.odd)
    }
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": False, **case.options}
    compiled = triton.compile(
        ASTSource(case.function, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(gpu.backend, gpu.arch, gpu.warp),
        options=options,
    )
    read = _read_amd if gpu.backend == "hip" else _read_nvidia
    facts, code = read(compiled)
    shared = compiled.metadata.shared
    return {
        "kernel": case.function.__name__,
        "target": target,
        "config": case.config,
        **facts,
        "shared_bytes": shared,
        "occupancy": occupancy(gpu, facts["registers"], shared, case.warps),
        "load_bits": code.width("load"),
        "store_bits": code.width("store"),
        "tensor_core": dict(Counter(code.kinds("mma").values())),
        "exp2_per_entry": code.exp2_per_entry(case),
    }


class Code:
    """Machine code: `instructions` is a list of (kind, detail), `loops` a list of (first, last) positions."""

    def __init__(self, lines: list[str], classify, label: str, branch: str):
        self.instructions: list[tuple[str, Any]] = []
        places: dict[str, int] = {}
        ends: dict[int, int] = {}  # first position of a loop -> position of its last branch back
        for line in lines:
            if found := re.match(label, line):
                places[found[1]] = len(self.instructions)
            elif found := re.search(branch, line):
                if found[1] in places:
                    ends[places[found[1]]] = len(self.instructions)
            else:
                self.instructions.append(classify(line))
        # The code after the last exit waits for barriers and then branches back into the kernel: this is no loop.
        exit = max(self.kinds("exit"), default=len(self.instructions))
        self.loops = [loop for loop in ends.items() if loop[1] <= exit]

    def kinds(self, kind: str, span: tuple[int, int] | None = None) -> dict[int, Any]:
        """Position -> detail of the instructions of this kind, in one loop (`span`) or in the whole kernel."""
        first, last = span or (0, len(self.instructions))
        return {i: self.instructions[i][1] for i in range(first, last) if self.instructions[i][0] == kind}

    def innermost(self, kind: str) -> list[tuple[int, int]]:
        loops = [loop for loop in self.loops if self.kinds(kind, loop)]
        return [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    def width(self, kind: str) -> int:
        loops = self.innermost(kind)
        # an AMD kernel with an assert also has loops that print its message: the loops with exponentials are ours
        ours = [loop for loop in loops if self.kinds("exp2", loop)] or loops
        inside = [w for loop in ours for w in self.kinds(kind, loop).values()]
        return min(inside) if inside else max(self.kinds(kind).values(), default=0)

    def exp2_per_entry(self, case: Case) -> float | None:
        if case.entries:
            return round(len(self.kinds("exp2")) / case.entries, 3)
        if not case.entry_bits:
            return None
        (loop,) = self.innermost("exp2")
        return round(len(self.kinds("exp2", loop)) / (sum(self.kinds("load", loop).values()) / case.entry_bits), 3)


KINDS = {"LDG": "load", "LDGSTS": "load", "STG": "store", "STL": "spill", "LDL": "spill", "EXIT": "exit"}
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA")


def _read_nvidia(compiled: Any) -> tuple[dict[str, int], Code]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = _tool("cuobjdump", "-res-usage", cubin), _tool("nvdisasm", "-c", cubin)

    def classify(line: str) -> tuple[str, Any]:
        mnemonic = re.sub(r"^\s*@\S+", "", line.split("*/", 1)[-1]).split()  # without address and predicate
        operation, *modifiers = mnemonic[0].split(".") if mnemonic else [""]
        bits = next((int(m.lstrip("US")) for m in modifiers if m.lstrip("US") in ("8", "16", "64", "128")), 32)
        kind = KINDS.get(operation, "")
        if operation == "MUFU" and "EX2" in modifiers:
            kind = "exp2"
        if operation in TENSOR_CORE:
            return "mma", operation
        return kind, bits

    code = Code(sass.splitlines(), classify, r"^(\.L_\w+):", r"\bBRA.*?`\((\.L_\w+)\)")
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    spilled = sum(code.kinds("spill").values()) // 8
    return {"registers": found["REG"], "spill_bytes": spilled, "stack_bytes": found["STACK"]}, code


def _read_amd(compiled: Any) -> tuple[dict[str, int], Code]:
    text = compiled.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", text)}

    def classify(line: str) -> tuple[str, Any]:
        operation = line.split()[0] if line.split() else ""
        if found := re.match(r"(?:global|buffer)_(load|store)_(\w+)", operation):
            words = re.search(r"dwordx?(\d*)|b(\d+)", found[2])
            return found[1], (32 * int(words[1] or 1) if words[2] is None else int(words[2])) if words else 16
        if operation.startswith("v_mfma"):
            return "mma", operation
        return ("exp2" if operation.startswith("v_exp_f32") else ""), 0

    code = Code(text.splitlines(), classify, r"^(\.LBB\w+):", r"s_c?branch\w*\s+(\.LBB\w+)")
    spilled = 4 * (found.get("vgpr_spill_count", 0) + found.get("sgpr_spill_count", 0))
    stack = found.get("private_segment_fixed_size", 0)
    return {"registers": found["vgpr_count"], "spill_bytes": spilled, "stack_bytes": stack}, code


def _tool(name: str, *arguments: object) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


# --- command line ---------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("reval_kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--kernel", nargs="*", help="names of kernels; all by default")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 turns compilation off: unset it")
    reports = []
    for target in options.target:
        for case in cases(TARGETS[target]):
            if options.kernel and case.function.__name__ not in options.kernel:
                continue
            reports.append(report(target, case))
            if not options.json:
                if len(reports) == 1:
                    print("\t".join(reports[0]))
                print("\t".join(str(x) for x in reports[-1].values()), flush=True)
    if options.json:
        print(json.dumps(reports))


if __name__ == "__main__":
    main()
