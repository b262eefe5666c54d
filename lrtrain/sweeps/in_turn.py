"""Running jobs one after another on torchrun's workers, each job in new child processes of the workers."""

import math
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig

from lrtrain.config.compose import typed
from lrtrain.distributed.threads import threads_asked_for
from lrtrain.distributed.world import meet_apart
from lrtrain.errors import ConfigError, RunFailed
from lrtrain.planning.budget import spend
from lrtrain.run.loop import pretrain
from lrtrain.run.stop import StopRequest
from lrtrain.sweeps.control import Control
from lrtrain.sweeps.jobs import Job, Outcome, outcome_without_start
from lrtrain.sweeps.report import Tell, run_needed
from lrtrain.sweeps.starter import Started, Starter

LOOK_EVERY = 0.5  # seconds between checks whether another process failed or a signal came
LET_GO = 10.0  # seconds after which a process that still waits for a failed one is killed; most fail by themselves


class InTurn:
    """Runs jobs beside this process and those that torchrun started with it. Made before anything is computed."""

    def __init__(self) -> None:
        if threads_asked_for(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) is None:
            os.environ.pop("OMP_NUM_THREADS", None)  # torchrun's; a child could not distinguish it from the user's
        self.starter = Starter(work)
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
        number = self.started
        mine = self._result(number, self.starter.start(number, job.composed), stop)
        if "failed" in mine:
            self.control.report(number)
        told = mine.pop("traceback", "")
        ended = self.control.agree(mine, combine)
        if ended.pop("failed_on", None) == self.control.dist_rank:
            print(told, end="", file=sys.stderr, flush=True)
        return Outcome(job.name, **ended)

    def _result(self, number: int, started: Started, stop: StopRequest) -> dict[str, Any]:
        """Wait for the child and return what `work` returned. Forwards a stop request, and kills the child if it still
        waits for another process that failed."""
        since, let_go = None, False
        while not started.ended(LOOK_EVERY):
            if stop.signal is not None:
                started.signal(signal.SIGTERM)  # repeatedly: a child that has just started ignores signals
            if since is None and self.control.failed(number):
                since = time.monotonic()
            if since is not None and time.monotonic() - since > LET_GO:
                started.signal(signal.SIGKILL)
                let_go = True
        return {"at": math.inf} | started.result if let_go else started.result


def combine(ended: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome from all processes' summaries or failures.

    Of several failures the first one counts: the others lost their connection to it. A process that was killed cannot
    say when, but nothing that fails elsewhere kills it, unless it was let go.
    """
    failed = {dist_rank: one for dist_rank, one in enumerate(ended) if "failed" in one}
    if failed:
        first = min(failed, key=lambda dist_rank: failed[dist_rank].get("at", 0.0))
        sentence = failed[first]["failed"]
        alike = all(one.get("failed") == sentence for one in ended)
        return {"status": "failed", "detail": sentence if alike else f"process {first}: {sentence}", "failed_on": first}
    if "stopped_by" in ended[0]:
        return {"status": "stopped", "detail": f"at step {ended[0]['step']}"}
    return {"status": "finished", "summary": ended[0]}


def work(number: int, composed: DictConfig) -> dict[str, Any]:
    """Run a job on one of its processes; returns what `train` returns, or the error: one sentence, the time in seconds,
    and the traceback of an unexpected one."""
    meet_apart(f"job {number}")
    try:
        return pretrain(spend(typed(composed)))
    except (ConfigError, RunFailed) as error:
        return {"failed": str(error), "at": time.time()}
    except Exception as error:
        sentence = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return {"failed": sentence, "at": time.time(), "traceback": traceback.format_exc()}
