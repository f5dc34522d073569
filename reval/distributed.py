"""The processes of one run, and their communication.

torchrun starts several processes; each computes its share of every batch. Without torchrun there is one process.
Trajectories are small, so every process holds the whole replay buffer and draws the same batches from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from .config import ConfigError

Item = TypeVar("Item")
VARIABLES = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets beside WORLD_SIZE. GPUs need LOCAL_RANK too."""


@dataclass(frozen=True, slots=True)
class World:
    """This process and its communication with the other processes. By default there is only one process; every method
    then returns at once."""

    rank: int = 0
    """The number of this process, from 0."""
    size: int = 1
    """How many processes there are."""

    @property
    def main(self) -> bool:
        """True for rank 0, the only process that writes files and output."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's share of `items`, which every process has: the items rank, rank + size, rank + 2 size, ..."""
        return list(items[self.rank :: self.size])

    def join(self, own: list[Item]) -> list[Item]:
        """The inverse of `share`: the items of all processes in their original order, on every process.

        Raises ValueError when the lengths are not those that `share` gives.
        """
        shares = self.gather(own)
        total = sum(map(len, shares))
        if [len(s) for s in shares] != [len(range(r, total, self.size)) for r in range(self.size)]:
            raise ValueError(f"the processes' shares do not fit together: {[len(s) for s in shares]} items")
        return [shares[i % self.size][i // self.size] for i in range(total)]

    def gather(self, item: Item) -> list[Item]:
        """The items of all processes, ordered by rank, on every process."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def broadcast(self, item: Item) -> Item:
        """The item of the main process, on every process."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def together(self, call: Callable[[], Item]) -> Item:
        """Call `call` and return its result. Every process has to call this.

        A ValueError or OSError on one process becomes a ConfigError on every process. A process that raised alone would
        leave the others waiting for it in the next collective operation.
        """
        error, result = None, None
        try:
            result = call()
        except (ValueError, OSError) as caught:
            error = caught
        for message in self.gather(None if error is None else str(error)):
            if message is not None:
                raise ConfigError(message) from error
        return cast(Item, result)

    def from_main(self, make: Callable[[], Item]) -> Item:
        """The result of `make`, which only the main process calls, on every process. Raises as `together` does."""
        return self.broadcast(cast(Item, self.together(lambda: make() if self.main else None)))


@contextmanager
def world(device: str, timeout: float) -> Iterator[World]:
    """Connect the processes that torchrun started until the block ends. torchrun sets VARIABLES and WORLD_SIZE.

    Args:
        device: the setting model.device. With GPUs each process uses the GPU of its local rank.
        timeout: seconds that a process waits for the others before it raises.

    Raises ConfigError when WORLD_SIZE is set without the other variables.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if size == "1":
        yield World()
        return
    gpu = device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    missing = [name for name in (*VARIABLES, *["LOCAL_RANK"] * gpu) if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={size} is set, but not {', '.join(missing)}: start several processes with torchrun, or unset "
            "WORLD_SIZE to train with one"
        )
    if gpu:
        # Some launchers show each process only its own GPU, as number 0.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # With GPUs gloo is needed too: it transports Python objects and shards in the CPU's memory.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
