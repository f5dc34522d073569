"""Stands in for reval_kernels.hf.token_values_of until that is merged."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from reval_kernels import TokenValues, linear_token_values

from ...model.head import head_of


def token_values_of(model: nn.Module, input_ids: Tensor, *, attention_mask: Tensor, mask: Tensor) -> TokenValues:
    """q, v and log_prob of each next token [B, T - 1]. Runs the model through its own call, so that DDP sees it."""
    inner: Any = model.module if hasattr(model, "module") else model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    found = {}

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        found["hidden"] = out.last_hidden_state

    hook = inner.base_model.register_forward_hook(keep)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    head = head_of(inner)._asdict()
    return linear_token_values(found["hidden"][:, :-1], actions=input_ids[:, 1:], mask=mask, **head)
