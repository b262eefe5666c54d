"""The processes of a run: rank, device, threads, and the process group.

"Process rank" here is torch's rank; `rank` alone always means a matrix rank in lrtrain.
"""

import functools
import itertools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lrtrain.distributed.memory import give_back_freed_memory, keep_freed_memory


@dataclass(frozen=True)
class World:
    """Where this process stands among the others."""

    dist_rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.dist_rank == 0


def environment_rank() -> int:
    """This process's rank as torchrun tells it, before any group exists."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """The number of processes as torchrun tells it, before any group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_runs = itertools.count()


@functools.cache
def rendezvous() -> dist.Store:
    """The store that torchrun's processes meet at, or one for a process alone."""
    return next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()


def start(save_memory: bool = False, timeout_minutes: float = 30) -> World:
    """Join the process group (of one, without torchrun) and set device and threads (cores ÷ local processes).

    A collective fails after twice `timeout_minutes`: before that a process without a sign of life is found, and named
    (`lrtrain.distributed.heartbeat`). On a CPU freed memory is kept for the next step (see `keep_freed_memory`) unless
    `save_memory`.
    """
    size, local_size = environment_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        give_back_freed_memory() if save_memory else keep_freed_memory()
    # A prefix of its own for each group: a second run in the same processes must not find the first one's keys.
    store = dist.PrefixStore(f"run {next(_runs)}", rendezvous())
    timeout = timedelta(minutes=2 * timeout_minutes)
    dist.init_process_group(backend, store=store, rank=environment_rank(), world_size=size, timeout=timeout)
    return World(environment_rank(), local_rank, size, device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
