"""The processes of a run: group, device, threads, and small agreements between them.

"Process rank" here is torch's rank; `rank` alone always means a matrix rank in lrtrain.
"""

import ctypes
import functools
import itertools
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lrtrain.errors import ConfigError

T = TypeVar("T")


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
    (`lrtrain.heartbeat`). On a CPU freed memory is kept for the next step (see `keep_freed_memory`) unless
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


# Parameters of glibc's mallopt, from malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8


def keep_freed_memory() -> None:
    """Let glibc keep what is freed: the next step asks for the same sizes again, and pages fresh from the system cost
    a fault each (measured on llama_60m with 1024 tokens a step: 1.4 × the tokens/s)."""
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    mallopt(MMAP_MAX, 0)


def give_back_freed_memory() -> None:
    """Let glibc return what is freed, from 1 MiB on: else holes between what is in use add up to gigabytes."""
    mallopt(MMAP_THRESHOLD, 2**20)
    mallopt(ARENA_MAX, 1)


def mallopt(parameter: int, value: int) -> None:
    """Set a parameter of glibc's allocator; without glibc: nothing."""
    if hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(parameter, value)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(*values: float) -> list[float]:
    """The values summed over all processes, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def largest(*values: float) -> list[float]:
    """The largest of each value over all processes."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process only; its result, or the ConfigError it raised, reaches every process."""
    outcome: tuple[T | None, ConfigError | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except ConfigError as error:
            outcome = (None, error)
    result, error = from_main(outcome)
    if error is not None:
        raise error
    return result


def on_all(action: Callable[[], T]) -> T:
    """Run `action` on every process; its result.

    Raises:
        ConfigError: on every process, if `action` raised one on any; naming these, if it did not on all.
    """
    result, error = None, None
    try:
        result = action()
    except ConfigError as raised:
        error = raised
    mine = None if error is None else (dist.get_rank(), socket.gethostname(), str(error))
    told: list[tuple[int, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    failed = [one for one in told if one is not None]
    if not failed:
        return result  # type: ignore[return-value]
    rank, host, sentence = failed[0]
    where = "" if len(failed) == len(told) else f"on process {rank} (host {host}) alone: "
    if 1 < len(failed) < len(told):
        where = f"on {len(failed)} of {len(told)} processes, the first is {rank} (host {host}): "
    raise ConfigError(f"{where}{sentence}") from error


def agree(value: str, what: str) -> None:
    """Check that all processes hold the same value.

    Raises:
        ConfigError: on every process, naming those that differ from process 0.
    """
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    others = [rank for rank, other in enumerate(values) if other != values[0]]
    if others:
        raise ConfigError(f"{what} differs between process 0 and {others}; start all with the same files and overrides")
