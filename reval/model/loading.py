"""Loading the policy and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reval_kernels.hf import head_of, note_transform, transform_of

from ..config import LoraConfig, ModelConfig
from ..distributed import World
from .builtin import SMOLLM2, random_model, smollm2_checkpoint, tiny_model
from .dtypes import compute_dtype, device_of
from .lora import add_adapters, load_adapters
from .packing import note_packing, packing_of
from .shapes import RANDOM
from .sharding import empty, shard

TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json"}
"""A folder with none of these files has no tokenizer."""


def load_model(
    config: ModelConfig,
    seed: int = 0,
    lora: LoraConfig | None = None,
    world: World | None = None,
    checkpoint: Path | None = None,
    offload: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The policy on its device, in evaluation mode (no dropout), and its tokenizer, which pads on the left.

    With several processes the main process reads the weights and sends each other process its slices.

    Args:
        seed: the seed of the random weights of `tiny` and `random:NAME`, and of new adapters.
        lora: adds adapters if lora.rank is set.
        checkpoint: a run's checkpoint. The model gets its weights from there; with lora.rank only the adapters.
        offload: keep the weights in the CPU's memory. With FSDP each layer moves to the device while it computes.

    Raises ValueError for a model or settings that cannot work, for example a head that ReVal does not know.
    """
    world, lora = world or World(), lora or LoraConfig()
    name = config.name if checkpoint is None or lora.rank else str(checkpoint)
    device = device_of(config.device)
    # Several processes: the main process has the whole weights, which may not fit on its GPU.
    target = torch.device("cpu") if world.size > 1 or offload else device
    model, tokenizer = _main_first(world, lambda: _load(config, name, seed, target))
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.gradient_checkpointing:
        # Reentrant checkpointing recomputes a layer without the hooks of FSDP, so the layer would have no weights.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora.rank:
        add_adapters(model, lora, seed)
        if checkpoint is not None:
            load_adapters(model, checkpoint)
    if world.size == 1:
        model.to(target)  # type: ignore[arg-type]  # transformers wraps `to` untyped
    else:
        shard(model, world, device, compute_dtype(config), offload=offload)
    return model.eval(), tokenizer


def _load(
    config: ModelConfig, name: str, seed: int, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer. The random weights of a shape are made on `device`; other models are on the CPU."""
    dtype = getattr(torch, config.dtype)
    if name == "tiny":
        model, tokenizer = tiny_model(seed)
        model = model.to(dtype)
    elif name.startswith(RANDOM):
        model, tokenizer = random_model(name, seed, dtype, device)
    else:
        path = smollm2_checkpoint() if name == SMOLLM2 else name
        tokenizer = _tokenizer(path, "model.name" if name == config.name else "the checkpoint")
        # head_of runs the model on the CPU, before it moves to a GPU. Other attentions may need a GPU.
        everywhere = config.attn_implementation in ("sdpa", "eager")
        attention = config.attn_implementation if everywhere else "sdpa"
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention)
        except SafetensorError as error:
            raise ValueError(f"the weights of the model {str(path)!r} cannot be read: {error}") from error
    head_of(model)  # raises for a head that the losses cannot compute
    packing_of(model)  # while the model is whole and on the CPU
    if model.config._attn_implementation != config.attn_implementation:
        model.set_attn_implementation(config.attn_implementation)
    return model, tokenizer


def _tokenizer(path: str | Path, whose: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ValueError with one line that says what is missing."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the tokenizers package raises plain Exception for a damaged tokenizer.json
        raise ValueError(f"{whose}: {_no_tokenizer(str(path), error)}") from error


def _no_tokenizer(path: str, error: Exception) -> str:
    folder = Path(path)
    if not folder.is_dir():
        if path.startswith(("/", ".")):
            return f"there is no folder '{path}'"
        return f"no folder is named '{path}', and the hub gave no tokenizer of this name: {_line(error)}"
    found = {file.name for file in folder.iterdir()}
    if found & TOKENIZER_FILES:
        return f"the tokenizer in '{path}' cannot be loaded: {_line(error)}"
    return (
        f"'{path}' has no tokenizer. It needs tokenizer.json and tokenizer_config.json, and holds "
        f"{', '.join(sorted(found)) or 'nothing'}. Save the tokenizer of the model that it comes from: "
        f"AutoTokenizer.from_pretrained(MODEL).save_pretrained('{path}')"
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _main_first(
    world: World, load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Call `load` on the main process. The other processes get a model of the same shape with uninitialized weights.

    If `load` fails, every process raises.
    """
    model = tokenizer = error = None
    if world.main:
        try:
            model, tokenizer = load()
        except (ValueError, OSError, ImportError) as caught:  # ImportError: the attention's package is missing
            error = str(caught)
    kind = None if model is None else (type(model), model.config, model.generation_config)
    looked = None if model is None else (packing_of(model), transform_of(model))
    error, kind, looked, tokenizer = world.broadcast((error, kind, looked, tokenizer))
    if kind is None or looked is None or tokenizer is None:
        raise ValueError(error)
    if model is None:
        model = note_packing(empty(*kind), looked[0])
        note_transform(model, looked[1])
    return model, tokenizer
