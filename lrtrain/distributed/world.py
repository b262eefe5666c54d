"""The processes of a run: rank, device, threads, and the process group.

"Process rank" here is torch's rank; `rank` alone always means a matrix rank in lrtrain.
"""

import functools
import itertools
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lrtrain.distributed.device import choose_device, let_segments_grow, named
from lrtrain.distributed.memory import give_back_freed_memory, keep_freed_memory
from lrtrain.distributed.threads import thread_count


@dataclass(frozen=True)
class World:
    """This process among the others."""

    dist_rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the main process, which prints and writes files."""
        return self.dist_rank == 0


def environment_rank() -> int:
    """This process's rank as torchrun tells it, before any group exists."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """The number of processes as torchrun tells it, before any group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


_runs = itertools.count()
APART = "LRTRAIN_APART"  # the prefix of the keys in the store, set by `meet_apart`


@functools.cache
def rendezvous() -> dist.Store:
    """torchrun's rendezvous store, or a new store for a single process."""
    if "RANK" not in os.environ:
        return dist.HashStore()
    return dist.PrefixStore(os.environ.get(APART, "together"), next(dist.rendezvous("env://"))[0])


def meet_apart(name: str) -> None:
    """Give the children of torchrun's workers a rendezvous of their own, under `name`. Call it before `rendezvous`."""
    os.environ[APART] = name
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torchrun or the main worker serves it already
    os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")


def first_to_say(sentence: str) -> bool:
    """Whether this is the first process to call it with this sentence, so that it is printed once."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        return rendezvous().add(f"said in attempt {attempt}: {sentence}", 1) == 1
    except RuntimeError:  # the store is gone, and with it the other processes
        return True


UNTIL_STEP_1, AFTER_STEP_1 = timedelta(minutes=5), timedelta(seconds=100)
"""How long a collective of NCCL may take: until step 1 is done others may be compiling."""


def start(save_memory: bool = False, timeout_minutes: float = 30, dumps: Path | None = None) -> World:
    """Join the process group (of one, without torchrun) and set device and threads (`thread_count`).

    A collective of gloo fails after twice `timeout_minutes`; before that, the heartbeat names a silent process. One of
    NCCL fails after `UNTIL_STEP_1`, and later after `AFTER_STEP_1` (see `limit_nccl`). On a CPU freed memory is kept
    for the next step (see `keep_freed_memory`) unless `save_memory`.

    Args:
        dumps: a folder for the last collectives of each process, which NCCL's watchdog writes when one timed out.
    """
    size, local_size = environment_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    threads, why = thread_count(local_size)
    torch.set_num_threads(threads)
    let_segments_grow()
    device = choose_device(local_rank, local_size)
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        record_collectives(dumps)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}  # NCCL connects here, not in the first step
    else:
        give_back_freed_memory() if save_memory else keep_freed_memory()
    # A separate prefix for each group: a second run in the same processes must not find the first one's keys.
    store = dist.PrefixStore(f"run {next(_runs)}", rendezvous())
    timeout = timedelta(minutes=2 * timeout_minutes)
    dist.init_process_group(store=store, rank=environment_rank(), world_size=size, timeout=timeout, **options)
    limit_nccl(UNTIL_STEP_1)
    if environment_rank() == 0:
        print(f"{size} × {named(device)}, {threads} threads each ({why})", flush=True)
    return World(environment_rank(), local_rank, size, device)


def record_collectives(dumps: Path | None) -> None:
    """Make NCCL's watchdog write the last collectives of each process to `dumps` when one timed out, unless the
    environment says otherwise. To be called before the process group is made."""
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    if dumps is not None:
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(dumps.absolute() / "process-"))


def limit_nccl(timeout: timedelta) -> None:
    """Set NCCL's timeout in all groups. Gloo keeps its own: over gloo the processes wait for data and files."""
    for group in dist.distributed_c10d._world.pg_map:
        if "nccl" in str(dist.get_backend_config(group)):
            nccl: Any = group._get_backend(torch.device("cuda"))
            nccl._set_default_timeout(timeout)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
