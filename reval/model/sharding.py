"""A model spread over the processes by FSDP2 (`torch.distributed.fsdp.fully_shard`), and its weights whole again.

Every process keeps a slice of every parameter; a layer's parameters are put together when the layer computes. The
losses read the head's weight, which belongs to no layer. `shard` therefore gives the model a method
`run_gathered(function)`: it runs `function` as a forward pass of the whole model, in which the parameters outside the
layers are whole.
"""

from __future__ import annotations

import copy
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..distributed import World


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer's layers, as transformers itself names what must not be split."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def shard(
    model: PreTrainedModel,
    world: World,
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    offload: bool = False,
    fill: bool = True,
) -> None:
    """Spread `model`, which the main process holds and the others have only the shape of, over all processes.

    The layers compute in `compute_dtype`; what is kept, the head, and the sum of the gradients stay in the parameters'
    own type. Gradients are summed over the processes, not averaged: every loss is divided by the global count. Without
    `fill` the main process's weights are not handed out: they are to be set later.
    """
    # detached: FSDP moves the parameters themselves to the device, and these shall not go with them
    whole = {name: p.detach() for name, p in model.named_parameters()} if world.main and fill else {}
    mesh = init_device_mesh(device.type, (world.size,))
    offload &= device.type != "cpu"  # there already; FSDP's policy would free what it takes for copies
    policy: Any = {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    layers = layers_of(model)
    for layer in layers:
        cast = compute_dtype != model.dtype
        # inputs stay as they are: autocast narrows what it must, and an attention mask in bf16 would overflow
        mixed = MixedPrecisionPolicy(
            compute_dtype if cast else None, reduce_dtype=model.dtype if cast else None, cast_forward_inputs=False
        )
        fully_shard(layer, mp_policy=mixed, **policy)
    fully_shard(model, **policy)
    for module in (*layers, model):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    setattr(model, "run_gathered", types.MethodType(lambda self, function: function(), model))  # noqa: B010
    register_fsdp_forward_method(model, "run_gathered")
    for name, parameter in model.named_parameters() if fill else ():
        _take(parameter, whole.pop(name, None))
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


@torch.no_grad()
def _take(parameter: nn.Parameter, whole: Tensor | None) -> None:
    """Fill this process's slice from the main process's whole parameter."""
    assert isinstance(parameter, DTensor)
    own = parameter.to_local()
    data = torch.empty(parameter.shape, dtype=own.dtype, device=own.device) if whole is None else whole.to(own.device)
    dist.broadcast(data.detach(), src=0)
    own.copy_(distribute_tensor(data, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local())


def empty(
    kind: type[PreTrainedModel], config: PreTrainedConfig, generation_config: Any, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of that architecture on the CPU, in memory that nothing has been written to."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config)).to(dtype or config.dtype)  # type: ignore[arg-type]
    model.to_empty(device="cpu").tie_weights()  # type: ignore[arg-type]
    model.generation_config = generation_config
    return model.eval()


def unsharded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model like `model`, but whole, without adapters, on the CPU, whose weights are not set."""
    new = empty(type(model), model.config, model.generation_config, dtype).requires_grad_(False)
    own = dict(new.named_buffers())
    for name, buffer in model.named_buffers():  # those that no checkpoint holds too, such as rotary frequencies
        own[name].copy_(buffer)
    return new


def reshard(model: PreTrainedModel) -> None:
    """Spread what is still whole: after a forward without gradient, that is all outside the layers."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Make `target` equal to `source`, which is spread in the same way: slice by slice, nothing is sent."""
    reshard(source)
    reshard(target)
    pairs = zip((*source.parameters(), *source.buffers()), (*target.parameters(), *target.buffers()), strict=True)
    for a, b in pairs:
        local(b).copy_(local(a))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread. Every process has to call this, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's slice."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
