"""The processes of one run: who they are, and what they tell each other.

Started by torchrun, every process computes its share of each batch; started plainly, there is one. Trajectories are
small, so every process holds the whole replay buffer, and draws the same batch from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class World:
    """This process and the others. The default is a process alone, for which all of this costs nothing."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of items that all have: every `size`-th one."""
        return list(items[self.rank :: self.size])

    def join(self, own: list[Item]) -> list[Item]:
        """All processes' shares, in the order that `share` took them from."""
        parts = self.gather(own)
        total = sum(map(len, parts))
        if [len(p) for p in parts] != [len(range(r, total, self.size)) for r in range(self.size)]:
            raise ValueError(f"the processes' shares do not fit together: {[len(p) for p in parts]} items")
        return [parts[i % self.size][i // self.size] for i in range(total)]

    def gather(self, item: Item) -> list[Item]:
        """Every process's item, by rank, on every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Item) -> Item:
        """The main process's item."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def world(device: str, timeout: float) -> Iterator[World]:
    """Join the processes that torchrun started (its environment variables say so), until the block ends.

    Args:
        device: the setting model.device. On GPUs each process takes the one of its local rank.
        timeout: seconds that a process waits for the others before it gives up with an error.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    gpu = device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    if gpu:
        # some launchers show each process its own GPU only
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # gloo too where there are GPUs: objects and CPU shards travel through it
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
