"""The batches of a run, read on a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from lrtrain.core.metrics import scalars
from lrtrain.distributed.collectives import run_on_all_ranks, sum_over_ranks
from lrtrain.errors import RunFailed
from lrtrain.run.rollback import beyond

if TYPE_CHECKING:
    from lrtrain.run.state import Run

T = TypeVar("T")


class Batches:
    """Reads this process's rows of the next batch."""

    def __init__(self, run: Run):
        self.run = run
        self.unreadable = run.data.faults.count
        """Number of documents skipped in the data so far."""

    def first(self) -> int:
        """The position of the next batch's first sequence."""
        progress = self.run.progress
        return beyond(progress.position, self.run.config.train.batch_size, progress.left_out)

    def next(self) -> tuple[Tensor, float] | None:
        """This process's rows (sequences, seq_len + 1) of the next batch, and the seconds that reading them took; None
        if any process got a signal first. A collective.

        A thread reads the rows, so that a signal or an overdue checkpoint is handled while the source is slow.
        """
        run, world = self.run, self.run.world
        read = partial(run.data.train.batch, self.first(), run.config.train.batch_size, world.dist_rank, world.size)
        reading = in_background(read)
        deadline = time.monotonic() + 60 * run.config.train.timeout_minutes
        while True:
            wait([reading], timeout=1.0)
            done = reading.done()
            waiting, failed, stop, lost, overdue, unreadable = sum_over_ranks(
                not done,
                done and reading.exception() is not None,
                run.stop.signal is not None,
                run.lock.lost(),
                run.saver.overdue(),
                run.data.train.faults.count,
            )
            if lost:
                raise RunFailed(
                    f"run.dir={run.dir} was removed or moved while it trained; the run ends at step "
                    f"{run.progress.step}, and nothing more is saved"
                )
            if stop:
                return None
            if overdue:
                run.saver.save(run)
            if not waiting:
                self._count_unreadable(run.data.faults.count + int(unreadable))
                return run_on_all_ranks(reading.result) if failed else reading.result()
            if time.monotonic() > deadline:
                self._give_up(waiting)

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


def in_background(call: Callable[[], T]) -> Future[tuple[T, float]]:
    """A future of (result, seconds) of `call`, run on a daemon thread."""
    future: Future[tuple[T, float]] = Future()

    def run() -> None:
        started = time.perf_counter()
        try:
            future.set_result((call(), time.perf_counter() - started))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
