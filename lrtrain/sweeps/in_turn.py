"""Running jobs one after another in the same processes, with cleanup between jobs."""

import ctypes
import gc
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lrtrain import distributed
from lrtrain.config.compose import typed
from lrtrain.errors import ConfigError, RunFailed
from lrtrain.planning.budget import spend
from lrtrain.run.loop import train
from lrtrain.run.stop import StopRequest
from lrtrain.sweeps.control import Control
from lrtrain.sweeps.jobs import Job, Outcome, outcome_without_start
from lrtrain.sweeps.report import Tell, run_needed


class InTurn:
    """Runs jobs in this process and those that torchrun started with it."""

    def __init__(self) -> None:
        self.control = Control()
        self.started = 0

    def run(self, jobs: list[Job], tell: Tell) -> list[Outcome]:
        """Run all jobs; returns the same outcomes on every process. A signal ends the sweep."""
        found = self.control.from_main(lambda: [asdict(one) if one else None for one in map(self._known, jobs)])
        stop = StopRequest()
        try:
            run = lambda left: [self._unless_stopped(job, stop, tell) for job in left]  # noqa: E731
            return run_needed(jobs, [Outcome(**one) if one else None for one in found], run, tell)
        finally:
            stop.restore()

    def _known(self, job: Job) -> Outcome | None:
        return outcome_without_start(job, self.control.size)

    def _unless_stopped(self, job: Job, stop: StopRequest, tell: Tell) -> Outcome:
        if self.control.agree(stop.signal is not None, any):
            return Outcome(job.name, "not started")
        tell.starts(job)
        outcome = self._run(job, stop)
        tell.ended(outcome)
        return outcome

    def _run(self, job: Job, stop: StopRequest) -> Outcome:
        """Run one job on all processes. An error on one process ends this job on all of them, and no other job."""
        self.started += 1
        number, mine = self.started, {}
        with self.control.watched(number):
            try:
                config = spend(typed(job.composed))
                mine = train(config, distributed.start(config.optim["in_backward"], config.train.timeout_minutes), stop)
            except Exception as error:
                self._report(number, error)
                mine = {"failed": str(error)}
        leave()  # the frames of a failure, and with them the model, are gone
        ended = self.control.agree(mine, lambda all_of_them: self._combine(number, all_of_them))
        return Outcome(job.name, **ended)

    def _report(self, number: int, error: Exception) -> None:
        """Report an error to the other processes, and print the traceback of unexpected ones."""
        told = isinstance(error, ConfigError | RunFailed)
        sentence = str(error) if told else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if self.control.report(number, sentence) and not told:
            traceback.print_exception(error, file=sys.stderr)

    def _combine(self, number: int, ended: list[dict[str, Any]]) -> dict[str, Any]:
        """The outcome from all processes' summaries or failures."""
        failed = [one["failed"] for one in ended if "failed" in one]
        if failed:
            dist_rank, sentence = self.control.failure(number)
            where = "" if len(ended) == 1 or failed == [sentence] * len(ended) else f"process {dist_rank}: "
            return {"status": "failed", "detail": where + sentence}
        if "stopped_by" in ended[0]:
            return {"status": "stopped", "detail": f"at step {ended[0]['step']}"}
        return {"status": "finished", "summary": ended[0]}


def leave() -> None:
    """Leave the process group, and free a job's memory and global state before the next one."""
    gc.collect()
    distributed.stop()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    with suppress(OSError):  # Linux: resets the peak of resident memory
        Path("/proc/self/clear_refs").write_text("5")
