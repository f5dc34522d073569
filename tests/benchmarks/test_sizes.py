"""The memory estimate of --dry-run against the measured peak of a small learner, on the CPU.

The shape is small enough for the CPU, and large enough that its tensors outweigh the small ones, such as masks, which
the estimate leaves out. A micro-batch is one trajectory of 2000 tokens, or of 640, where each case would take too long.
Adam, gradients, activations and the reference each are a considerable part of the sum.
"""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu.sizes import CHECKPOINTED, REFERENCE, SHAPE, SIZES, TOLERANCE, UPDATE, Size, compared, estimated
from reval.estimate import PROMPT, peak
from reval.model.shapes import shape_of

LARGER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "vocab_size": 8000}
BF16 = "model.compute_dtype=bfloat16"
CASES = {
    "plain": (),
    "checkpointed": (CHECKPOINTED,),
    "untied head": ("untied",),
    "autocast": (BF16,),
    "autocast, checkpointed": (BF16, CHECKPOINTED),
    "bf16": ("model.dtype=bfloat16",),
    "offloaded": ("reference.offload=true", CHECKPOINTED),
    "LoRA": ("lora.rank=8",),
    "LoRA, bf16": ("lora.rank=8", "model.dtype=bfloat16"),
    "LoRA, bf16, checkpointed": ("lora.rank=8", "model.dtype=bfloat16", CHECKPOINTED),
    "LoRA, autocast, checkpointed": ("lora.rank=8", BF16, CHECKPOINTED),
}


def marked(name: str):
    """Without AVX-512, torch multiplies bf16 slowly on a CPU."""
    return pytest.param(name, marks=[pytest.mark.slow] * any("bfloat16" in s for s in CASES[name]))


@pytest.mark.parametrize("name", map(marked, CASES))
def test_the_estimate_is_within_15_percent_of_the_peak(name, tmp_path):
    settings = [s for s in CASES[name] if s != "untied"]
    tokens = 2000 if name == "plain" else 640
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | LARGER | {"tie_word_embeddings": name != "untied head"}))
    case = Size(name, (f"model.name=random:{tmp_path}", "model.compute_dtype=float32", *settings), tokens - PROMPT)
    found = {row["phase"]: row for row in compared(case, "cpu")}
    assert found.keys() == {REFERENCE, UPDATE} and TOLERANCE == 0.15
    for phase, row in found.items():
        sizes = f"{row['estimated'] / 2**20:.1f} of {row['measured'] / 2**20:.1f} MiB"
        print(f"{name}, {phase}: {sizes} ({row['error']:+.1%})")
    assert all(abs(row["error"]) < TOLERANCE for row in found.values())


def test_the_cases_of_a_card_are_the_paper_s_sizes():
    for case in SIZES:
        config = case.config("cuda:0")
        shape = shape_of(config.model.name)
        assert config.optim.micro_batch_tokens == 8192 + PROMPT
        assert estimated(config)[UPDATE] < case.least * 2**30 * 1.2, "the case fits where it is tried"
        assert peak(config, shape, 1)[0] in ("the loss", "the backward pass", REFERENCE)
