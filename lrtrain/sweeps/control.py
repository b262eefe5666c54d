"""Communication between the processes of a sweep, independent of the jobs' process groups."""

import itertools
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lrtrain.distributed.world import environment_rank, environment_world_size, rendezvous

T = TypeVar("T")


class Control:
    """Communication through torchrun's rendezvous store."""

    def __init__(self) -> None:
        self.dist_rank, self.size = environment_rank(), environment_world_size()
        self.store = dist.PrefixStore("sweep", rendezvous())
        self.store.set_timeout(timedelta(days=365))  # jobs may take any time; torchrun detects dead processes
        self._rounds = itertools.count()

    def agree(self, value: T, combine: Callable[[list[T]], Any]) -> Any:
        """`combine` of all processes' values, in their order, computed on the main process and returned on all."""
        key = f"round {next(self._rounds)}"
        self.store.set(f"{key} {self.dist_rank}", json.dumps(value))
        if self.dist_rank == 0:
            values = [json.loads(self.store.get(f"{key} {rank}")) for rank in range(self.size)]
            self.store.set(key, json.dumps(combine(values)))
        return json.loads(self.store.get(key))

    def from_main(self, value: Callable[[], Any]) -> Any:
        """The main process's `value()`, on every process."""
        return self.agree(value() if self.dist_rank == 0 else None, lambda values: values[0])

    def leave(self) -> None:
        """Wait for all processes. The main one, which may hold the store, leaves last: the others may still read it."""
        self.agree(True, all)
        if self.dist_rank:
            self.store.set(f"left {self.dist_rank}", "")
        else:
            self.store.wait([f"left {rank}" for rank in range(1, self.size)])

    def report(self, job: int) -> None:
        """Report that a job failed on this process."""
        self.store.set(f"failure of job {job}", "")

    def failed(self, job: int) -> bool:
        """Whether a job has failed on any process."""
        return self.store.check([f"failure of job {job}"])
