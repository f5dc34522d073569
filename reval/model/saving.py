"""The weights of the policy, whole and under the names that from_pretrained uses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .lora import merged
from .sharding import reshard, whole

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0}
"""Settings of a generation config that only sampling uses, with their defaults."""


def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each weight, one at a time. Every process has to iterate to the end, because FSDP
    gathers each weight from all processes.

    Tied weights appear once. Adapters are merged into the weights that they adapt.
    """
    reshard(model)
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and "lora_" not in name:
            yield name.replace(".base_layer.", "."), merged(model, name, whole(tensor.detach()))


def save_model(model: PreTrainedModel, folder: Path, write: bool) -> None:
    """Save whole weights, with merged adapters, for from_pretrained.

    Every process has to call this; the one with `write` writes the files.
    """
    weights = {name: tensor.cpu() for name, tensor in whole_weights(model) if write}
    if write:
        with torch.device("meta"):
            shell = type(model)(model.config)
        generation = shell.generation_config = copy.deepcopy(model.generation_config)
        # transformers loads a generation config with, for example, a temperature and do_sample=False, but refuses to
        # save one.
        unused = [getattr(generation, name, None) not in (None, default) for name, default in SAMPLING.items()]
        generation.do_sample = generation.do_sample or any(unused)
        shell.save_pretrained(folder, state_dict=weights)
