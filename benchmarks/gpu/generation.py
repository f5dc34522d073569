"""The part generation: tokens a second of the hf rollout engine, with SmolLM2-135M's shape and random weights."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch

from .record import Job, NotRun, Record

BEFORE = 490
"""Tokens a second of transformers' generate on an H200: 256 responses of 82 tokens on average, 512 at most, to prompts
of 44 tokens, in bfloat16 (83 ms a step)."""
TIMES = 10
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {**SMOLLM2, "vocab_size": 512, "hidden_size": 144, "intermediate_size": 96, "num_hidden_layers": 2}
PROMPT, MEAN = 44, 82


class _NoEnd:
    eos_token_id = None


def generation(job: Job, record: Record) -> None:
    """Generate as in `BEFORE`. One word in 82 ends a response, so lengths are geometric, as random as a model's."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise NotRun(str(error)) from error
    from reval.rollout.hf import HFRollout

    prompts, longest = (2, 16) if job.rehearse else (32, 512)
    torch.manual_seed(0)
    sizes: dict[str, Any] = (TINY if job.rehearse else SMOLLM2) | {"tie_word_embeddings": True}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes))
    model = model.to(job.device, torch.bfloat16).eval()
    words = range(sizes["vocab_size"])
    model.generation_config.eos_token_id = list(words[:: round(MEAN)])
    engine = HFRollout(model, _NoEnd(), batch_size=256)  # type: ignore[arg-type]
    ids = torch.randint(sizes["vocab_size"], (prompts, PROMPT)).tolist()
    rows: list[dict[str, Any]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, tokens in (("first call", 16), ("second call", longest)):
            start = time.perf_counter()
            out = engine.generate(ids, responses=8, max_new_tokens=tokens, temperature=1.0, seed=0)
            seconds = time.perf_counter() - start
            made = [len(response.token_ids) for group in out for response in group]
            rows.append({"name": name, "responses": len(made), "longest": max(made), "tokens": sum(made)})
            rows[-1] |= {"seconds": seconds, "tokens_per_second": sum(made) / seconds}
    bar = {"at_least": TIMES * BEFORE, "met": rows[-1]["tokens_per_second"] >= TIMES * BEFORE}
    record.write(generation={"rows": rows, "warnings": [str(w.message) for w in caught], **bar})
