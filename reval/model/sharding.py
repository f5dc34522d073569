"""Sharding a model over the processes with FSDP2 (`torch.distributed.fsdp.fully_shard`), and gathering its weights.

Every process keeps a slice of every parameter. A layer's parameters are gathered while the layer computes, and those
outside the layers, such as the head's, while the whole model does. The losses read the head's weight, so they are
computed inside the model's call (`at_head` in reval_kernels/model_head.py).
"""

from __future__ import annotations

import copy
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
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..distributed import World


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the transformer: the modules that transformers itself marks as not to be split."""
    kinds = set(model._no_split_modules or ())
    # fully_shard gives a module a subclass of its class with another name: FSDPLlamaDecoderLayer
    return [m for m in model.modules() if any(c.__name__ in kinds for c in type(m).__mro__)]


def shard(
    model: PreTrainedModel,
    world: World,
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    offload: bool = False,
    fill: bool = True,
) -> None:
    """Shard `model` over all processes. Only the main process has the weights; the others have a model of that shape.

    The layers compute in `compute_dtype`. The stored parameters, the head and the sum of the gradients keep the dtype
    of the parameters. Gradients are summed over the processes and not averaged, because every loss is already divided
    by the number of trajectories in the whole batch.

    Args:
        offload: keep the shards in the CPU's memory.
        fill: send the weights of the main process to the others. Without it the caller sets the weights later.
    """
    # detach: FSDP moves the parameters to the device, and these copies must stay where they are
    whole = {name: p.detach() for name, p in model.named_parameters()} if world.main and fill else {}
    mesh = init_device_mesh(device.type, (world.size,))
    # On a CPU there is nothing to offload. FSDP's offload policy would mistake the weights for copies and free them.
    offload &= device.type != "cpu"
    policy: Any = {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    layers = layers_of(model)
    for layer in layers:
        cast = compute_dtype != model.dtype
        # FSDP must not cast the inputs: autocast does so where needed, and an attention mask in bf16 would overflow.
        mixed = MixedPrecisionPolicy(
            compute_dtype if cast else None, reduce_dtype=model.dtype if cast else None, cast_forward_inputs=False
        )
        fully_shard(layer, mp_policy=mixed, **policy)
    fully_shard(model, **policy)
    for module in (*layers, model):
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name, parameter in model.named_parameters() if fill else ():
        _take(parameter, whole.pop(name, None))
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


@torch.no_grad()
def _take(parameter: nn.Parameter, whole: Tensor | None) -> None:
    """Fill this process's slice of a parameter from the whole parameter, which the main process sends."""
    assert isinstance(parameter, DTensor)
    own = parameter.to_local()
    data = torch.empty(parameter.shape, dtype=own.dtype, device=own.device) if whole is None else whole.to(own.device)
    dist.broadcast(data.detach(), src=0)
    own.copy_(distribute_tensor(data, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local())


def empty(
    kind: type[PreTrainedModel], config: PreTrainedConfig, generation_config: Any, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A model of class `kind` on the CPU with uninitialized weights."""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config)).to(dtype or config.dtype)  # type: ignore[arg-type]
    model.to_empty(device="cpu").tie_weights()  # type: ignore[arg-type]
    model.generation_config = generation_config
    return model.eval()


def unsharded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A whole model of the same architecture on the CPU, without adapters and with uninitialized weights."""
    new = empty(type(model), model.config, model.generation_config, dtype).requires_grad_(False)
    own = dict(new.named_buffers())
    for name, buffer in model.named_buffers():  # also buffers that no checkpoint has: rotary frequencies
        own[name].copy_(buffer)
    return new


def reshard(model: PreTrainedModel) -> None:
    """Free the gathered parameters. After a forward pass without gradient, the parameters outside the layers are still
    gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


@torch.no_grad()
def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copy the weights of `source` to `target`, which is sharded in the same way. Each process copies its slices, so
    nothing is sent."""
    reshard(source)
    reshard(target)
    pairs = zip((*source.parameters(), *source.buffers()), (*target.parameters(), *target.buffers()), strict=True)
    for a, b in pairs:
        local(b).copy_(local(a))


def whole(tensor: Tensor) -> Tensor:
    """`tensor` as a whole: gathered if it is sharded. Every process has to call this, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's slice of `tensor`, or `tensor` itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
