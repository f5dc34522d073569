"""Low-rank adapters (peft) on the policy's layers. The reference is the same model without adapters or with older ones.

peft injects the adapters into the model, which keeps its class. The rest of the trainer treats the model like any
other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..config import LoraConfig
from .sharding import local, whole

POLICY, REFERENCE = "policy", "reference"
FILE = "adapters.safetensors"


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze the model. Then add two adapters to each layer in `config.targets`: one for the policy, which is trained,
    and one for the reference.

    New adapters have no effect. Raises ValueError for targets that do not exist, and for the head, whose weight the
    losses read.
    """
    try:
        import peft
    except ImportError:
        raise ValueError("lora.rank needs the package peft: pip install peft") from None
    names = config.targets if config.targets == "all-linear" else [n.strip() for n in config.targets.split(",")]
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    if head in names:
        raise ValueError(
            f"lora.targets must not name the head ({head!r}), whose weight the losses read; got {config.targets!r}"
        )
    alpha: Any = config.alpha  # typed as int, used as float
    settings = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are intended
        torch.manual_seed(seed)
        for adapter in (REFERENCE, POLICY):
            peft.inject_adapter_in_model(settings, model, adapter)
    for layer in adapted(model):
        layer.set_adapter(POLICY)


def adapted(model: PreTrainedModel) -> list[Any]:
    """The layers that have adapters."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


@contextmanager
def reference_adapters(model: PreTrainedModel, version: int) -> Iterator[None]:
    """Within the block the model computes as the reference: without adapters in version 0, and with the reference's
    adapters after a reset."""
    layers = adapted(model)
    for layer in layers:
        layer.set_adapter(REFERENCE, inference_mode=True)
        layer.enable_adapters(version > 0)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter(POLICY)


@torch.no_grad()
def reset_reference_adapters(model: PreTrainedModel) -> None:
    """Copy the policy's adapters to the reference's. Each process copies its slices."""
    for layer in adapted(model):
        for matrix in (layer.lora_A, layer.lora_B):
            local(matrix[REFERENCE].weight).copy_(local(matrix[POLICY].weight))


def merged(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """The weight of that name with its adapter, if it has one: W + (alpha / r) B A."""
    module_name, dot, kind = name.rpartition(".base_layer.")
    if not dot or kind != "weight":
        return weight
    layer: Any = model.get_submodule(module_name)
    a, b = whole(layer.lora_A[POLICY].weight.detach()), whole(layer.lora_B[POLICY].weight.detach())
    return weight + (layer.scaling[POLICY] * (b @ a)).to(weight.dtype)


def save_adapters(model: PreTrainedModel, folder: Path, write: bool) -> None:
    """Save the whole adapters of policy and reference. Every process has to call this; the one with `write` writes."""
    weights = {name: whole(p.detach()).cpu() for name, p in model.named_parameters() if "lora_" in name}
    if write and weights:
        save_file({name: w.contiguous() for name, w in weights.items()}, folder / FILE)


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: Path) -> None:
    """Load the adapters that `save_adapters` wrote, into a model that is not sharded yet. Raises ValueError if the file
    has other adapters than the model."""
    own = {name: p for name, p in model.named_parameters() if "lora_" in name}
    saved = load_file(folder / FILE) if (folder / FILE).exists() else {}
    if own.keys() != saved.keys() or any(own[name].shape != w.shape for name, w in saved.items()):
        raise ValueError(
            f"the adapters in {folder} are not those that lora.rank and lora.targets ask for; a run is resumed with "
            "the settings it was started with"
        )
    for name, parameter in own.items():
        parameter.copy_(saved[name])
