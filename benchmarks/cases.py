"""The cases of the tables and of the curves: for a CPU, for a GPU, and small ones for a trial.

A case of a GPU has a name, by which gpu/bars.py finds its rows, and a tiny shape, with which a CPU rehearses it.
"""

from __future__ import annotations

from functools import partial

import torch

import reval_kernels

from .bars import FASTEST_OF
from .ops import Shape
from .suite import Case

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS, BOTH = "token_values forward", "token_values forward+backward"
LINEAR, LINEAR_BOTH = "linear_token_values forward", "linear_token_values forward+backward"
LOSS, FROZEN = "linear_reval_loss forward+backward", "linear_reval_loss of a frozen head forward+backward"
BELLMAN = "bellman_loss forward+backward"
OURS = ("triton", "cpu")


def multiplies_bf16(device: str) -> bool:
    """Whether torch has fast bf16 matmuls on this device. Slow bf16 matmuls of the larger head take minutes."""
    return device == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def tables(device: str, quick: bool, patient: bool = False) -> list[Case]:
    """The cases of the tables.

    Where torch's bf16 matmuls are slow, the heads get a sixteenth of the tokens in bf16. `patient` keeps all tokens of
    the smaller head.
    """
    if quick:
        rows, head, heads, values = Shape(8, 4, 8192), Shape(8, 4, 4096, 64), [Shape(8, 4, 4096, 64)], Shape(8, 64)
    elif device == "cuda":
        return [case for part in GPU_PARTS for case in gpu_cases(part)]
    else:  # the shapes that bars.py names
        rows, head, values = Shape(8, 64, 151_936), Shape(8, 128, 49_152, 576), Shape(64, 1024)
        heads = [head, Shape(8, 128, 151_936, 576)]
    few = (*OURS, "torch eager")
    # Memory needs one child process for each provider of each case. To save time, most cases measure few providers.
    frugal = partial(Case, memory=few, others=False)
    cases = [frugal(ROWS, rows, dtype) for dtype in (F32, BF16)]
    cases += [frugal(BOTH, rows, F32), Case(BOTH, rows, BF16)]
    slow = not quick and not multiplies_bf16(device)

    def cut(shape: Shape, dtype: torch.dtype) -> Shape:
        few = slow and dtype == BF16 and not (patient and shape == head)
        return shape._replace(length=shape.length // 16) if few else shape

    cases += [frugal(LINEAR, cut(head, dtype), dtype) for dtype in (F32, BF16)]
    cases += [Case(LOSS, cut(heads[0], dtype), dtype, memory=few) for dtype in (F32, BF16)]
    # the larger head: only our backends and the peers that bars.py compares with
    named = (*OURS, *FASTEST_OF)
    cases += [frugal(LOSS, cut(h, dtype), dtype, only=named) for h in heads[1:] for dtype in (F32, BF16)]
    return [*cases, Case(BELLMAN, values, F32)]


def curves(device: str, quick: bool) -> list[Case]:
    """Time and memory against N at fixed V, and against V at fixed N.

    The providers are our default backend and plain PyTorch; for heads also cut-cross-entropy.
    """
    ours = next(name for name, info in reval_kernels.backends().items() if {device, "*"} & set(info.default_for))
    who = (ours, "torch eager", "cut-cross-entropy torch_compile" if device == "cpu" else "cut-cross-entropy")
    lengths, vocabularies = [8, 16, 32, 64], [16_384, 32_768, 65_536, 131_072]
    width, length = (576, 32) if device == "cpu" else (2048, 256)
    head, vocabulary = 49_152, 151_936
    if quick:
        lengths, vocabularies, width, length, head, vocabulary = [2, 4], [1024, 2048], 64, 4, 2048, 4096
    dtype = BF16 if multiplies_bf16(device) else F32
    loss = partial(Case, LOSS, dtype=dtype, only=who)
    rows = partial(Case, BOTH, dtype=F32, only=who[:2])
    return [
        *(loss(shape=Shape(8, t, head, width), curve="N") for t in lengths),
        *(loss(shape=Shape(8, length, v, width), curve="V") for v in vocabularies),
        *(rows(shape=Shape(8, t, vocabulary), curve="N") for t in lengths),
        *(rows(shape=Shape(8, length, v), curve="V") for v in vocabularies),
    ]


# --- on a GPU --------------------------------------------------------------------------------------------------------

GPU_SHAPES = {  # name: the shape, and the shape of a rehearsal on a CPU
    "rows": (Shape(16, 512, 151_936), Shape(2, 3, 70)),
    "rows fp32": (Shape(8, 512, 151_936), Shape(2, 2, 70)),
    "rows, small vocabulary": (Shape(32, 512, 32_000), Shape(2, 2, 33)),
    "few rows": (Shape(1, 64, 151_936), Shape(1, 2, 70)),
    "head 2048": (Shape(16, 512, 151_936, 2048), Shape(2, 3, 70, 16)),
    "head 4096": (Shape(16, 512, 151_936, 4096), Shape(2, 3, 70, 32)),
    "head 4096, half the tokens": (Shape(8, 512, 151_936, 4096), Shape(1, 3, 70, 32)),
    "small head": (Shape(16, 512, 49_152, 576), Shape(2, 3, 40, 24)),
    "fp32 head": (Shape(8, 512, 151_936, 2048), Shape(2, 2, 70, 16)),
    "trajectories": (Shape(256, 4096), Shape(3, 5)),
}
HEADLINE = "head 4096"
GPU_PARTS = ("rows", "linear", "bellman", "precision")
CHECKED = 2
"""Trajectories that are compared with float64, where not all are."""
COMPILED = "torch.compile"
ROW_PROVIDERS = ("triton", "torch eager", "torch eager log_softmax", "quack", "Liger", "TRL selective_log_softmax")
HEAD_PROVIDERS = (
    "triton",
    "torch eager",
    "F.linear_cross_entropy",
    "quack",
    "Liger",
    "Liger scaled",
    "cut-cross-entropy",
    "cut-cross-entropy unfiltered",
    "TRL fused head",
)


def gpu_cases(part: str, tiny: bool = False) -> list[Case]:
    """The cases of one of GPU_PARTS. `tiny`: with shapes that Triton's interpreter finishes in a second.

    Outputs are compared with float64 on CHECKED trajectories, except where torch.compile takes part: another shape
    would be compiled anew, which takes longer than the truth.
    """

    def case(op: str, name: str, dtype: torch.dtype, only: tuple[str, ...], **options) -> Case:
        shape = GPU_SHAPES[name][tiny]
        check = 0 if COMPILED in only or shape.trajectories <= CHECKED else CHECKED
        return Case(op, shape, dtype, only=only, name=name, check=check, **options)

    if part == "rows":
        out = []
        for dtype, name in ((BF16, "rows"), (F16, "rows"), (F32, "rows fp32")):
            compiled = (COMPILED,) if dtype == BF16 else ()
            out += [case(op, name, dtype, ROW_PROVIDERS + compiled) for op in (ROWS, BOTH)]
        small = [(op, dtype) for dtype in (BF16, F16, F32) for op in (ROWS, BOTH)]
        out += [case(op, "rows, small vocabulary", dtype, ROW_PROVIDERS) for op, dtype in small]
        return out + [case(op, "few rows", BF16, ROW_PROVIDERS, wall=True) for op in (ROWS, BOTH)]
    if part == "linear":
        return [
            case(LOSS, HEADLINE, BF16, HEAD_PROVIDERS),
            case(LOSS, "head 2048", BF16, (*HEAD_PROVIDERS, COMPILED)),
            case(LINEAR, "head 2048", BF16, HEAD_PROVIDERS),
            case(LOSS, "head 4096, half the tokens", BF16, HEAD_PROVIDERS),
            case(LOSS, "small head", BF16, HEAD_PROVIDERS),
            case(FROZEN, "head 2048", BF16, HEAD_PROVIDERS),
            case(LINEAR_BOTH, "head 2048", BF16, HEAD_PROVIDERS),
        ]
    if part == "bellman":
        return [case(BELLMAN, "trajectories", F32, ("triton", "torch eager", COMPILED), wall=True)]
    return [case(op, "fp32 head", F32, (), precision=True) for op in (LINEAR, LOSS)]
