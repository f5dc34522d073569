"""The gradient of one of two ranks of verl's FSDP2 engine: python verl_ranks.py RANK FOLDER

Each rank has half of the batch of test_verl.py. Rank 0 writes the reduced gradients to FOLDER/gradients.pt.
"""

import sys
from functools import partial
from pathlib import Path

import torch

RANK, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
store = torch.distributed.FileStore(str(FOLDER / "store"), 2)
torch.distributed.init_process_group("gloo", store=store, rank=RANK, world_size=2)

import test_verl  # noqa: E402  # registers the plugin
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

data = tu.index_select_tensor_dict(test_verl.micro_batch(), [2 * RANK, 2 * RANK + 1])
engine = test_verl.made_engine(str(FOLDER / "model"))
with engine.train_mode():
    engine.forward_backward_batch(data, partial(ppo_loss, config=test_verl.actor()))
    gradients = {name: w.grad.full_tensor() for name, w in engine.module.named_parameters()}
if RANK == 0:
    torch.save(gradients, FOLDER / "gradients.pt")
