"""python -m benchmarks.head_precision: the noise of the residual for each precision of the head's matmul, on the CPU.

The residual of a response contains the policy's return V(s_1) + sum_t log pi(a_t | s_t). The command samples responses
from SmolLM2 at temperature 1, computes the last hidden states in float32, and multiplies them with the model's head in
each precision. The error is the difference from float64 logits of the same float32 hidden states and weights.

Tensor cores round the operands, multiply exactly and sum in float32. Here float32 matmuls of rounded operands emulate
them; the order of the sums, and how a tensor core rounds inside a sum, differ. Log-sum-exp and the sum over tokens are
in float64 for every precision, so that the matmul's error is seen alone.

A response is a chain of windows: independent samples of at most 600 tokens, each after a prompt. The end token does not
end a window. Every window is measured once, and serves every length.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from reval.config import ModelConfig
from reval.model.builtin import SMOLLM2
from reval.model.loading import load_model
from reval_kernels.hf import head_of

from .report import stamp

WINDOW = 600
PROMPTS = (
    "Tell me a story about a lighthouse.",
    "Explain how a refrigerator works.",
    "A train travels 180 km in 2.5 hours. What is its average speed? Think step by step.",
    "Write a Python function that merges two sorted lists, and explain it.",
    "What were the causes of the French Revolution?",
    "Describe your favourite recipe for a rainy day.",
)
MANTISSA = {"bf16": 7, "tf32": 10}
"""Explicit mantissa bits."""
TRUNK = "bf16 trunk"


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 `x` with `bits` explicit mantissa bits, rounded to nearest, ties to even. `x` must be finite."""
    drop = 23 - bits
    whole = x.contiguous().view(torch.int32)
    whole = whole + ((1 << (drop - 1)) - 1) + ((whole >> drop) & 1)
    return (whole & -(1 << drop)).view(torch.float32)


def split(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`x` as a sum of two numbers with `bits` mantissa bits: x rounded, and what is left, rounded."""
    high = rounded(x, bits)
    return high, rounded(x - high, bits)


class Head:
    """A head's float32 weight [V, D], split once for all precisions."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.double = weight, weight.double()
        self.parts = {name: split(weight, bits) for name, bits in MANTISSA.items()}

    def logits(self, hidden: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names of precisions, and the logits [T, V] of float32 hidden states [T, D] in each, one after another."""
        yield "exact", hidden @ self.weight.T
        for name, bits in MANTISSA.items():
            (high, low), (weight_high, weight_low) = split(hidden, bits), self.parts[name]
            product = high @ weight_high.T
            yield name, product
            if name == "bf16":
                yield "bf16 logits", rounded(product, bits)
            yield f"{name}x3", product + (high @ weight_low.T + low @ weight_high.T)

    def errors(self, hidden: Tensor, actions: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        """The errors [2, T] of V and log pi in nats, by precision.

        Args:
            other: hidden states [T, D] of a trunk in another precision, for TRUNK: their head is exact.
        """
        truth = values(hidden.double() @ self.double.T, actions)
        found = {name: values(logits, actions) - truth for name, logits in self.logits(hidden)}
        return found if other is None else found | {TRUNK: values(other @ self.weight.T, actions) - truth}


def values(logits: Tensor, actions: Tensor) -> Tensor:
    """V and log pi of each action [T] from logits [T, V], computed in float64: [2, T]."""
    z = logits.double()
    v = z.logsumexp(-1)
    return torch.stack([v, z.gather(-1, actions[:, None])[:, 0] - v])


class Progress:
    """Prints at most every 10 seconds how many steps are done, and an estimate of the time left."""

    def __init__(self, what: str, steps: int) -> None:
        self.what, self.steps, self.start, self.shown = what, steps, time.monotonic(), -math.inf

    def done(self, step: int) -> None:
        now = time.monotonic()
        if now - self.shown > 10 or step == self.steps:
            left = (now - self.start) / step * (self.steps - step)
            print(f"{self.what}: {step} of {self.steps}, about {left / 60:.1f} min left", file=sys.stderr, flush=True)
            self.shown = now


def sample(model: PreTrainedModel, states: Tensor, mask: Tensor, length: int) -> Tensor:
    """Continuations [B, length] of prompts [B, S] (mask 0: padding on the left), sampled at temperature 1."""
    progress, cache, taken = Progress("sampling tokens", length), None, []
    for step in range(length):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -states.shape[1] :]
        inputs = {"input_ids": states, "attention_mask": mask, "position_ids": positions}
        out: Any = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, states = out.past_key_values, torch.multinomial(out.logits[:, -1].softmax(-1), 1)
        mask = torch.cat([mask, torch.ones_like(states)], 1)
        taken.append(states)
        progress.done(step + 1)
    return torch.cat(taken, 1)


def hidden_states(model: PreTrainedModel, prompt: Tensor, actions: Tensor, bf16: bool) -> Tensor:
    """The last hidden states [T, D] before each action [T], in float32; with `bf16` the layers compute in bf16, as
    model.compute_dtype=bfloat16 does."""
    body: Any = model.base_model
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = body(input_ids=torch.cat([prompt, actions[:-1]])[None], use_cache=False).last_hidden_state
    return hidden[0, len(prompt) - 1 :].float()


def summarize(windows: list[dict[str, Tensor]], length: int) -> list[dict[str, Any]]:
    """Root mean square and maximum of the errors over the responses of `length` tokens that the windows make."""
    rows = []
    for name in dict.fromkeys(name for window in windows for name in window):
        errors = [window[name] for window in windows if name in window]
        each = math.ceil(length / errors[0].shape[1])
        responses = [torch.cat(errors[i : i + each], 1)[:, :length] for i in range(0, len(errors) - each + 1, each)]
        if not responses:
            continue
        returns = torch.stack([v[0] + log_prob.sum() for v, log_prob in responses])
        log_probs = torch.cat([log_prob for _, log_prob in responses])
        row: dict[str, Any] = {"length": length, "precision": name, "responses": len(responses)}
        for what, x in (("return", returns), ("log_prob", log_probs)):
            row |= {f"{what}_rms": x.square().mean().sqrt().item(), f"{what}_max": x.abs().max().item()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    heads = ("length", "precision", "responses", "return_rms", "return_max", "log_prob_rms", "log_prob_max")
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    cells = ((f"{row[k]:.2g}" if isinstance(row[k], float) else str(row[k]) for k in heads) for row in rows)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.head_precision", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[14, 600, 5000], help="tokens [14 600 5000]")
    parser.add_argument("--responses", type=int, default=4, help="of the greatest length; shorter ones are more [4]")
    parser.add_argument("--trunk", type=int, help="how many of them have a bf16 trunk too, which is slow [all]")
    parser.add_argument("--model", default=SMOLLM2, help=f"a name or folder, as model.name of the trainer [{SMOLLM2}]")
    parser.add_argument("--output", type=Path, help="a json file for the results; without it they are only printed")
    args = parser.parse_args(words)
    for name, given in (("lengths", min(args.lengths)), ("responses", args.responses)):
        if given < 1:
            parser.error(f"--{name} must be positive, got {given}")
    return args


@torch.inference_mode()
def main(words: list[str] | None = None) -> int:
    args, where = arguments(words), stamp(torch.device("cpu"))
    torch.manual_seed(0)
    logging.disable_progress_bar()
    model, tokenizer = load_model(ModelConfig(name=args.model, device="cpu", dtype="float32"))
    weight, *rest, _ = head_of(model)
    if rest != [None, None, 1.0]:
        raise ValueError(f"--model {args.model}: only a plain head is measured; bias, softcap, temperature: {rest}")
    head = Head(weight.detach())
    length = min(WINDOW, max(args.lengths))
    each = math.ceil(max(args.lengths) / length)
    count, trunks = args.responses * each, each * (args.responses if args.trunk is None else args.trunk)
    chats = [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(count)]
    text: list[str] = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)  # type: ignore
    prompts = tokenizer(text, padding=True, add_special_tokens=False, return_tensors="pt")
    states, mask = prompts["input_ids"], prompts["attention_mask"]

    windows: list[dict[str, Tensor]] = []
    try:
        samples = sample(model, states, mask, length)
        progress = Progress(f"measuring windows of {length} tokens", count)
        for i, actions in enumerate(samples):
            prompt = states[i][mask[i].bool()]
            other = hidden_states(model, prompt, actions, bf16=True) if i < trunks else None
            windows.append(head.errors(hidden_states(model, prompt, actions, bf16=False), actions, other))
            progress.done(i + 1)
    except KeyboardInterrupt:
        print(f"interrupted: {len(windows)} of {count} windows are measured", file=sys.stderr)
    rows = [row for length in args.lengths for row in summarize(windows, length)]
    print(table(rows))
    if args.output and rows:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": args.model, "window": length, "windows": len(windows), "of": count}
        args.output.write_text(json.dumps({"stamp": where, **facts, "rows": rows}, indent=1) + "\n")
        print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
