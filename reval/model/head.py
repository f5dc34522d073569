"""The head of a language model: it turns the last hidden states into logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class OutputHead(NamedTuple):
    """logits = softcap(hidden @ weight.T + bias) / temperature.

    V is the size of the vocabulary, D the width of the hidden states.

    The fields are keyword arguments of the kernels: linear_token_values(hidden, actions=actions, **head._asdict()).
    """

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    """[V]"""
    softcap: float | None
    """c in c * tanh(logits / c). None: no softcap."""
    temperature: float
    """The inverse of the model's logit scale. It belongs to the model and is not the sampling temperature."""
    precision: str = "exact"
    """The least precision of the products, from the setting model.head_precision."""


def head_of(model: PreTrainedModel) -> OutputHead:
    """The head of the model, from its output embeddings and its configuration.

    Raises ValueError, with the model's name, for a head that `OutputHead` cannot describe.
    """
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
    return OutputHead(layer.weight, layer.bias, softcap or None, 1.0 / scale)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raise ValueError if the logits of the model differ from those of `head_of(model)`.

    Without this check, such a model would train with wrong values and without an error.
    """
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
