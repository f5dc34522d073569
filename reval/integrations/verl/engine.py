"""verl's FSDP engine with V beside the log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from reval_kernels import token_values

from .loss import given


@EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda", "cpu"], vendor="reval")
class ReValEngine(FSDPEngineWithLMHead):
    """FSDPEngineWithLMHead, but the model output has `state_values`, V(s_t) of each token, beside `log_probs`.

    All values come from one pass of `reval_kernels.token_values` over the logits. V is the logsumexp of the logits
    divided by verl's temperature, and log_probs are those of the same distribution, as in verl's own engine.
    """

    def forward_step(self, micro_batch: TensorDict, loss_function: Callable | None, forward_only: bool) -> Any:
        if loss_function is not None:
            loss_function = partial(_with_given, loss_function)
        return super().forward_step(micro_batch, loss_function, forward_only)

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Callable | None
    ) -> dict[str, Tensor]:
        """Nested tensors [B, t]: log_probs, state_values, and entropy if `calculate_entropy` is set.

        Raises:
            ValueError: an option of verl that needs its own pass over the logits.
        """

        def option(name: str, default: bool = False) -> bool:
            return tu.get_non_tensor_data(data=micro_batch, key=name, default=default)

        for name in ("use_fused_kernels", "calculate_sum_pi_squared", "distillation_use_topk"):
            if option(name):
                raise ValueError(f"{name} must be false with VERL_ENGINE_VENDOR=reval: it reads the logits itself")
        logits = output.logits.full_tensor() if isinstance(output.logits, DTensor) else output.logits
        with_entropy = option("calculate_entropy")
        offsets = micro_batch["input_ids"].offsets()
        actions = output_args["input_ids_rmpad_rolled"]
        if option("use_remove_padding", True):
            found = token_values(
                logits.squeeze(0), actions, temperature=output_args["temperature_rmpad"], with_entropy=with_entropy
            )
            fields = [self._gather_and_unpad_packed(x, output_args["pad_size"]) for x in found[1:] if x is not None]
        else:
            mask = torch.arange(logits.shape[1], device=logits.device) < offsets.diff()[:, None]
            padded = actions.new_zeros(mask.shape).masked_scatter(mask, actions)
            temperature = output_args["temperature"][:, None].expand(mask.shape)
            found = token_values(logits, padded, mask=mask, temperature=temperature, with_entropy=with_entropy)
            fields = [x[mask] for x in found[1:] if x is not None]
        names = ("state_values", "log_probs", "entropy")[: len(fields)]
        return {n: torch.nested.nested_tensor_from_jagged(x, offsets) for n, x in zip(names, fields, strict=True)}


def _with_given(loss_function: Callable, *, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any) -> Any:
    """`loss_function` of verl, while the policy loss can see its arguments."""
    with given(model_output, data):
        return loss_function(model_output=model_output, data=data, dp_group=dp_group)
