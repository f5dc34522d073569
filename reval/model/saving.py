"""The policy's weights, whole and under the names of from_pretrained's files."""

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
"""What only sampling uses, in a generation config."""


def whole_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names as in from_pretrained's files, and whole tensors, one at a time. Every process has to go through them all.

    Tied weights come once, adapters as part of what they adapt.
    """
    reshard(model)
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved and "lora_" not in name:
            yield name.replace(".base_layer.", "."), merged(model, name, whole(tensor.detach()))


def save_model(model: PreTrainedModel, folder: Path, write: bool) -> None:
    """Save whole weights, adapters merged, so that from_pretrained loads them. Every process has to call this."""
    weights = {name: tensor.cpu() for name, tensor in whole_weights(model) if write}
    if write:
        with torch.device("meta"):
            shell = type(model)(model.config)
        generation = shell.generation_config = copy.deepcopy(model.generation_config)
        # transformers would refuse to save, say, a temperature without sampling, though it loads it
        unused = [getattr(generation, name, None) not in (None, default) for name, default in SAMPLING.items()]
        generation.do_sample = generation.do_sample or any(unused)
        shell.save_pretrained(folder, state_dict=weights)
