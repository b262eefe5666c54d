"""The batches of a run, and what its processes agree on before each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import wait
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lrtrain.core.metrics import scalars
from lrtrain.distributed.collectives import run_on_all_ranks, sum_over_ranks
from lrtrain.errors import RunFailed
from lrtrain.run.reading import Reader
from lrtrain.run.rollback import beyond

if TYPE_CHECKING:
    from lrtrain.run.state import Run


class Said(NamedTuple):
    """What a process has to say before the next batch, or the sums over all processes."""

    waiting: float = 0
    """Whether the batch is not there yet."""
    failed: float = 0
    """Whether it could not be read."""
    stop: float = 0
    """Whether there was a signal."""
    lost: float = 0
    """Whether the run's directory is gone."""
    overdue: float = 0
    """Whether a checkpoint is due by the clock."""
    unreadable: float = 0
    """Documents skipped so far."""

    def on(self, device: torch.device) -> Tensor:
        """The values in float64 on a device, without waiting for it."""
        values = torch.zeros(len(self), dtype=torch.float64, device=device)
        for place, value in zip(values, self, strict=True):
            if value:
                place.fill_(float(value))
        return values


class Batches:
    """This process's rows of one batch after another, read ahead while steps run."""

    def __init__(self, run: Run):
        self.run = run
        self.reader: Reader | None = None
        self.agreed: Said | None = None
        """What all processes said during the last step; None where they may have more to say since."""
        self.unreadable = run.data.faults.count
        """Number of documents skipped in the data so far."""

    def first(self) -> int:
        """The position of the next batch's first sequence."""
        progress = self.run.progress
        return beyond(progress.position, self.run.config.train.batch_size, progress.left_out)

    def next(self) -> tuple[Tensor, float] | None:
        """This process's rows (sequences, seq_len + 1) of the next batch, and the seconds that the processes waited for
        it; None if any process got a signal first. A collective where a batch is late or `agreed` is None.

        A signal or an overdue checkpoint is handled while the source is slow.
        """
        run, waited = self.run, 0.0
        if self.reader is None:  # not before the run has its position in the data
            self.reader = Reader(run.data.train, self._positions(), self._read, run.world.device)
        deadline = time.monotonic() + 60 * run.config.train.timeout_minutes
        while True:
            said = self.agreed
            if said is None:
                started = time.perf_counter()
                wait([self.reader.ahead[0]], timeout=1.0)
                mine = time.perf_counter() - started
                said = Said(*sum_over_ranks(*self.say()))
                waited += time.perf_counter() - started if said.waiting else mine
            self.agreed = None
            if said.lost:
                raise RunFailed(
                    f"run.dir={run.dir} was removed or moved while it trained; the run ends at step "
                    f"{run.progress.step}, and nothing more is saved"
                )
            if said.stop:
                return None
            if said.overdue:
                run.saver.save(run)
            if not said.waiting:
                self._count_unreadable(run.data.faults.count + int(said.unreadable))
                return run_on_all_ranks(self.reader.take) if said.failed else self.reader.take(), waited
            if time.monotonic() > deadline:
                self._give_up(said.waiting)

    def _positions(self) -> Iterator[int]:
        """The position of each batch that is still to come."""
        progress, config = self.run.progress, self.run.config.train
        position = progress.position
        for _ in range(progress.step, config.steps):
            position = beyond(position, config.batch_size, progress.left_out)
            yield position
            position += config.batch_size

    def _read(self, position: int) -> Tensor:
        run = self.run
        return run.data.train.batch(position, run.config.train.batch_size, run.world.dist_rank, run.world.size)

    def say(self) -> Said:
        """What this process has to say before the next batch, if there is one."""
        run, ahead = self.run, self.reader.ahead if self.reader else None
        due = ahead[0] if ahead else None
        done = due is None or due.done()
        failed = due is not None and done and due.exception() is not None
        unreadable = due.result().unreadable if due is not None and done and not failed else 0
        stop = run.stop.signal is not None
        return Said(not done, failed, stop, run.lock.lost(), run.saver.overdue(), unreadable)

    def _count_unreadable(self, count: int) -> None:
        """Log the number of skipped documents if it has grown."""
        if count > self.unreadable:
            self.run.log(scalars("data", {"unreadable": count}))
        self.unreadable = count

    def _give_up(self, waiting: float) -> None:
        run = self.run
        raise RunFailed(
            f"{waiting:g} of {run.world.size} processes have waited for the batch of step {run.progress.step + 1} for "
            f"train.timeout_minutes={run.config.train.timeout_minutes:g}"
        )
