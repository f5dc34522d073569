"""The program that test_fsdp_alone.py starts: updates of a model that FSDP2 shards over one process.

python tests/reval/fsdp_alone.py cpu|cuda FOLDER    # FOLDER has the config.json of a shape
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from reval.config import Config, load_config
from reval.distributed import World
from reval.learner import Learner
from reval.model.dtypes import compute_dtype, with_dtypes
from reval.model.loading import load_model
from reval.model.sharding import shard, whole
from reval.reference_policy import ReferencePolicy


def updates(config: Config, sharded: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradient norms of three updates, and the weights after them."""
    from made import random_trajectories

    model, _ = load_model(config.model, seed=1)
    if sharded:
        shard(model, World(), model.device, compute_dtype(config.model))
        assert all(isinstance(p, DTensor) for p in model.parameters())
    reference, learner = ReferencePolicy(load_model(config.model, seed=1)[0], config), Learner(model, config)
    batch, numbers = random_trajectories(6, seed=3), []
    for _ in range(3):
        reference.annotate(batch)
        out = learner.update(batch)
        numbers += [out["loss"], out["grad_norm"]]
    return numbers, {name: whole(p).detach().cpu() for name, p in model.named_parameters()}


if __name__ == "__main__":
    device, folder = sys.argv[1:]
    # gradient checkpointing excludes shared prompts, which FSDP cannot compute
    settings = [f"model.name=random:{folder}", f"model.device={device}", "model.gradient_checkpointing=true"]
    config = with_dtypes(load_config([], [*settings, "model.compute_dtype=float32", "optim.eps=1e-5"]))
    with tempfile.TemporaryDirectory() as place:
        store = dist.FileStore(str(Path(place) / "store"), 1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
        (alone, weights), (plain, expected) = updates(config, True), updates(config, False)
        dist.destroy_process_group()
    print(alone, plain)
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(plain), rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)
    print("equal")
