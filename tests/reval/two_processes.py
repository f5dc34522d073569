"""The program that test_distributed.py starts with torchrun. It runs three updates for each case and saves the results.

torchrun --nproc-per-node 2 tests/reval/two_processes.py FOLDER
"""

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from reval.config import Config, load_config
from reval.distributed import World, world
from reval.learner import Learner
from reval.model.loading import load_model
from reval.model.packing import plan_for
from reval.model.saving import whole_weights
from reval.model.sharding import layers_of, whole
from reval.reference_policy import ReferencePolicy
from reval.replay import Trajectory
from reval.rollout.probe import log_probs

# AdamW divides a gradient by the gradient's size. A gradient that is only rounding error, about 1e-9 here, has a random
# direction. With the default eps of 1e-8, its step would be about as long as any other. This eps makes it nearly 0.
ADAM = ["optim.eps=1e-5"]
CASES = {
    "plain": [],
    "many micro-batches": ["optim.micro_batch_tokens=20"],
    "padded": ["optim.packing=padded", "optim.micro_batch_tokens=30"],
    "adapters": ["lora.rank=4"],
    "checkpointed activations": ["model.gradient_checkpointing=true"],
    "offloaded reference": ["reference.offload=true"],
    "token level": ["objective.level=token"],
    "importance ratio": [
        "objective.name=grpo",
        "objective.normalization=token",
        "reference.reset_every=1",
        "optim.micro_batch_tokens=20",
    ],
    "tapered": [
        "objective.taper=true",
        "objective.value_gradient=false",
        "reference.reset_every=1",
        "optim.micro_batch_tokens=20",
    ],
    "log Z of groups": ["objective.name=tba", "optim.micro_batch_tokens=20"],
    "one trajectory": [],
    "random weights": ["model.name=random:tests/reval/shape"],
    "bf16 compute": ["model.compute_dtype=bfloat16"],
}


def batch_for(case: str) -> list[Trajectory]:
    """Trajectories that do not divide evenly by two: unequal lengths, several turns, and some prompts in common."""
    from made import random_trajectories

    made = [*random_trajectories(7, seed=3), *random_trajectories(2, seed=5, turns=3)]
    for t in made[:3]:
        other = copy.deepcopy(t)
        other.token_ids = np.append(t.token_ids[:-1], 11).astype(np.int32)
        made.append(other)
    for i, t in enumerate(made):
        t.group = i % 4
    return made[:1] if case == "one trajectory" else made


def updates(config: Config, processes: World, case: str, folder: Path | None = None) -> dict[str, Any]:
    """Three updates with a reset in between. The state after two of them goes into `folder`."""
    model, _ = load_model(config.model, 0, config.lora, processes)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    attention: Any = layers_of(model)[0].self_attn
    attention.register_forward_hook(count)
    reference, learner = ReferencePolicy(model, config, processes), Learner(model, config, processes)
    trajectories, done, gradients = batch_for(case), [], {}

    def note_gradients(*_: Any) -> None:
        gradients.update({n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})

    learner.optimizer.register_step_pre_hook(note_gradients)
    for step in range(3):
        if step == 2 and folder is not None:
            dcp.save({"optimizer": learner.state(), "weights": model.state_dict()}, checkpoint_id=folder)
        reference.annotate(trajectories)
        passes = 0
        out = learner.update(trajectories)
        done.append((out["loss"], out["grad_norm"], out["residual_terms"]["residual"].sort().values))
        if step == 1:
            reference.reset()
    ids = trajectories[0].token_ids.tolist()
    return {
        "updates": done,
        "passes": passes / len(plan_for(model, trajectories, processes, config)),
        "gradients": gradients,
        "weights": {name: w.clone() for name, w in whole_weights(model)},
        "dtypes": {p.dtype for p in model.parameters()},
        "reference": [t.reference for t in trajectories],
        "behavior": [t.behavior for t in trajectories],
        "log_probs": log_probs(model, [ids, ids[:3]], [1, 2], config.model),
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with world("cpu", timeout=60) as processes:
        for case, overrides in CASES.items():
            config = load_config(["configs/tiny.yaml"], ADAM + overrides)
            result = updates(config, processes, case, target / f"{case}.dcp")
            if processes.main:
                torch.save(result, target / f"{case}.pt")
        everyone = processes.gather(processes.rank)
        joined = processes.join([x * 10 for x in processes.share(range(5))])
        told = processes.broadcast("main" if processes.main else "other")
        if processes.rank == 1:  # the other processes must see the same as the main process
            torch.save({"everyone": everyone, "joined": joined, "told": told}, target / "world.pt")
