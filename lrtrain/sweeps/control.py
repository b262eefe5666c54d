"""Communication between the processes of a sweep, independent of the jobs' process groups, which failures break."""

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lrtrain.distributed.world import environment_rank, environment_world_size, rendezvous
from lrtrain.sweeps.connections import cut_connections_but, open_connections

T = TypeVar("T")
LOOK_EVERY = 0.5  # seconds between checks whether another process failed
LET_GO = 120.0  # seconds after which a process that still waits for a failed one is ended


class Control:
    """Communication through torchrun's rendezvous store."""

    def __init__(self) -> None:
        self.dist_rank, self.size = environment_rank(), environment_world_size()
        self.store = dist.PrefixStore("sweep", rendezvous())
        self.store.set_timeout(timedelta(days=365))  # jobs may take any time; torchrun detects dead processes
        # A separate connection, because a store that waits for one thread blocks the others.
        own = rendezvous().clone() if self.size > 1 else None  # pyright: ignore[reportAttributeAccessIssue]
        self.watching = dist.PrefixStore("sweep", own) if own else None
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

    def report(self, job: int, failure: str) -> bool:
        """Report that this process failed in a job; returns whether it was the first to fail."""
        first = self.store.add(f"failures of job {job}", 1) == 1
        if first:
            self.store.set(f"failure of job {job}", json.dumps([self.dist_rank, failure]))
        return first

    def failure(self, job: int) -> tuple[int, str]:
        """The process that failed first in a job, and the reason."""
        dist_rank, failure = json.loads(self.store.get(f"failure of job {job}"))
        return dist_rank, failure

    @contextmanager
    def watched(self, job: int) -> Iterator[None]:
        """A context for running a job, which aborts this process's waits after another process has failed."""
        if self.watching is None:
            yield
            return
        done = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(job, done, open_connections()), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _watch(self, job: int, done: threading.Event, spared: dict[str, int]) -> None:
        assert self.watching is not None
        since = None
        while not done.wait(LOOK_EVERY):
            if not self.watching.check([f"failure of job {job}"]):
                continue
            since = since or time.monotonic()
            for group in list(dist.distributed_c10d._world.pg_map):
                group.abort()  # ends NCCL's collectives, but not gloo's
            cut_connections_but(spared)
            if time.monotonic() - since > LET_GO:
                told = f"process {self.dist_rank} still waits for one that failed; the same line goes on"
                print(told, file=sys.stderr, flush=True)
                os._exit(1)
