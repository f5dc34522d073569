"""token_values_of on two processes (gloo) against one: DistributedDataParallel, FSDP2, and a head split by words.

The processes start once and run every case. Each has half of the rows; with tensor parallelism both have all rows.
"""

import os
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cases import DEVICE
from test_hf import SMALL, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from reval_kernels import reference
from reval_kernels.hf import at_head, head_of, token_values_of

B, T = 4, 6


def data() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens, mask, and the gradients of q, v and log_prob. The last row has no action."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, SMALL["vocab_size"], (B, T + 1), generator=generator)
    mask = torch.rand(B, T, generator=generator) < 0.6
    mask[-2:] = False
    mask[0] = True
    return ids, mask, [torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(3)]


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): p for name, p in model.named_parameters()}


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def near(ours: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    scale = float(expected.abs().max()) + 1e-3
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * scale, msg=lambda x: f"{name}: {x}")


def check(model: nn.Module, tied: bool = False, rows: slice | None = None, tolerance: float = 1e-12) -> None:
    """Values and gradients must be those of one process with all rows, in two passes with one in between for which
    there is no backward."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rows = rows or slice(rank * B // world, (rank + 1) * B // world)
    parts = 1 if rows == slice(None) else world  # DDP and FSDP2 average the gradients
    ids, mask, by = data()
    one = make("softcap", tie_word_embeddings=tied)
    own = reference.token_values(one(input_ids=ids).logits[:, :-1], ids[:, 1:], mask=mask)
    torch.autograd.backward(list(own[:3]), by)
    expected = {name: p.grad for name, p in one.named_parameters()}
    for _ in range(2):
        model.zero_grad()
        ours = token_values_of(model, ids[rows], mask=mask[rows])
        for name, a, b in zip(ours._fields, ours[:3], own[:3], strict=False):
            near(a.detach(), b.detach()[rows], tolerance, name)
        torch.autograd.backward(list(ours[:3]), [x[rows].to(ours.v.dtype) for x in by])
        for name, p in weights_of(model).items():
            near(whole(p.grad) * parts, expected[name], 2 * tolerance, name)
        with torch.no_grad():
            token_values_of(model, ids[rows], mask=mask[rows])


def sharded(tied=False, *, layers=True, head=None, root=None, policy=None, output=None) -> nn.Module:
    """A model under FSDP2. `layers`: each is a unit; `head`, `root`: their reshard_after_forward."""
    model, mesh = make("softcap", tie_word_embeddings=tied), init_device_mesh("cpu", (dist.get_world_size(),))
    options = {"mesh": mesh, "mp_policy": policy or MixedPrecisionPolicy()}
    for layer in model.model.layers if layers else ():
        fully_shard(layer, **options)
    if head is not None:
        fully_shard(model.lm_head, reshard_after_forward=head, **options)
    if output is not None:
        options["mp_policy"] = MixedPrecisionPolicy(output_dtype=output)
    fully_shard(model, reshard_after_forward=root, **options)
    return model


def split_head(**options) -> nn.Module:
    """51 words over two ranks: 26 and 25."""
    model = make("softcap", tie_word_embeddings=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(**options)})
    return model


def cases() -> Iterator[str]:
    for tied in (False, True):
        yield f"DDP {tied}"
        check(DistributedDataParallel(make("softcap", tie_word_embeddings=tied), find_unused_parameters=tied), tied)
        yield f"FSDP2 {tied}"
        check(sharded(tied), tied)
        yield f"FSDP2, one unit {tied}"
        check(sharded(tied, layers=False), tied)
        yield f"FSDP2, root freed after the forward {tied}"
        check(sharded(tied, root=True), tied)
    for head in (False, True):
        yield f"FSDP2, the head is a unit {head}"
        check(sharded(head=head, root=head))
    yield "FSDP2 in bfloat16"
    check(sharded(policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)), tolerance=0.1)
    yield "a head split by words"
    for options in ({}, {"use_local_output": False}):
        check(split_head(output_layouts=Replicate(), **options), rows=slice(None))
    yield "refused"
    refused()


def refused() -> None:
    """Logits that come out split, or too coarse to measure; and what other functions cannot compute."""
    ids = data()[0]
    with pytest.raises(ValueError, match=r"turned logits of shape \[1, 1, 51\] into \[1, 1, 2[56]\]"):
        token_values_of(split_head(), ids)
    with pytest.raises(ValueError, match="is split over 2 ranks by tensor parallelism; of the functions here"):
        at_head(split_head(output_layouts=Replicate()), lambda hidden, head: (), input_ids=ids)
    model = sharded(output=torch.bfloat16)
    with pytest.raises(ValueError, match=r"come out as torch.bfloat16, too coarse.*head_of\(model\) once before"):
        token_values_of(model, ids)
    model = make("softcap")
    head_of(model)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    check(model, tied=True)  # the values do not pass through the model's output, so they are not rounded


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    case = ""
    try:
        for case in cases():  # noqa: B007  # the name of the case that fails
            pass
    except BaseException:
        (Path(folder) / f"rank{rank}").write_text(f"{case}\n{traceback.format_exc()}")
        os._exit(1)  # exit at once: the other ranks may wait for this one
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on one machine")
def test_two_processes(tmp_path):
    try:
        mp.spawn(rank_main, (2, str(tmp_path)), nprocs=2)
    except mp.ProcessExitedException:
        pytest.fail("\n".join(path.read_text() for path in sorted(tmp_path.glob("rank*"))))
