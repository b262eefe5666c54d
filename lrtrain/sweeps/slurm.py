"""Running jobs on a Slurm cluster, each with its own torchrun on its nodes."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from lrtrain.sweeps.jobs import Job, Outcome
from lrtrain.sweeps.processes import SAVING, own_environment, reason, torchrun
from lrtrain.sweeps.report import Tell

PORTS = range(20_000, 30_000)  # rendezvous ports on the first node, one for each job that shares it
SAVE = signal.SIGUSR2  # submitit's signal, sent by Slurm to every process of a job


class Torchrun:
    """The command on each node of a job: a torchrun that joins those of the other nodes."""

    def __init__(self, job: Job, nproc: int, failure: Path):
        self.job = job
        self.nproc = nproc
        self.failure = failure
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """Run torchrun and return its exit code; SIGTERM is forwarded, so that the run saves in time."""
        options = ["--standalone"]
        if (nodes := int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))) > 1:
            first = submitit.JobEnvironment().hostnames[0]
            job = os.environ["SLURM_JOB_ID"]
            options = [
                f"--nnodes={nodes}",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint={first}:{PORTS[int(job) % len(PORTS)]}",
                f"--rdzv-id={job}",
            ]
        self.process = process = subprocess.Popen(
            torchrun(self.job, self.nproc, *options),
            env=os.environ | own_environment(self.failure),
            preexec_fn=partial(signal.pthread_sigmask, signal.SIG_BLOCK, [SAVE]),  # only torchrun's processes handle it
        )
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()

    def checkpoint(self) -> DelayedSubmission:
        """The job that submitit requeues after preemption or the time limit: the same one, which resumes.

        submitit calls this in a signal handler and then ends the process, so it waits until the run is saved. Slurm has
        signalled the run's processes too, except those that torchrun had not started yet.
        """
        latest, told = time.monotonic() + SAVING, set()
        while self.process is not None and runs(self.process.pid) and time.monotonic() < latest:
            for worker in {*children(self.process.pid)} - told:  # once: one that has saved heeds it no more
                told.add(worker)
                with suppress(ProcessLookupError):
                    os.kill(worker, SAVE)
            time.sleep(0.5)
        # Requeuing sends SIGTERM to the whole job; `scontrol requeue`, run by submitit next, inherits SIG_IGN.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(Torchrun(self.job, self.nproc, self.failure))


def runs(child: int) -> bool:
    """Whether a child process is running.

    Without `Popen.wait`, because a signal handler that interrupts it would deadlock on its lock.
    """
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except ChildProcessError:  # it has been reaped already
        return False


def children(process: int) -> list[int]:
    """The child processes of a process."""
    try:
        return [*map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split())]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return []


class Slurm:
    """Submits all jobs, waits for them, and reads their outcomes.

    Args:
        folder: the sweep's folder, on a shared file system.
        cluster: slurm, or submitit's `local` and `debug` to try it out.
        nproc: processes on each node.
        wait: if false, submit and exit; the same command reads the results later.
        settings: of `submitit.AutoExecutor.update_parameters`.
    """

    def __init__(self, folder: Path, cluster: str, nproc: int, wait: bool, settings: dict[str, Any]):
        self.logs = folder / "slurm"
        self.nproc = nproc
        self.wait = wait
        self.executor = submitit.AutoExecutor(folder=self.logs, cluster=cluster)
        self.executor.update_parameters(**settings)

    def run(self, jobs: list[Job], tell: Tell) -> list[Outcome]:
        """Run all jobs; Ctrl-C leaves submitted jobs running."""
        submitted = {}
        for job in jobs:
            tell.starts(job)
            self._failure(job).unlink(missing_ok=True)
            self.executor.update_parameters(name=job.name)
            submitted[job.name] = self.executor.submit(Torchrun(job, self.nproc, self._failure(job)))
        outcomes: dict[str, Outcome] = {}
        try:
            while self.wait and len(outcomes) < len(jobs):
                for job in jobs:
                    if job.name not in outcomes and submitted[job.name].done():
                        outcomes[job.name] = self._ended(job, submitted[job.name])
                        tell.ended(outcomes[job.name])
                time.sleep(0.5)
        except KeyboardInterrupt:
            pass
        left = {name: Outcome(name, "submitted", f"as {one.job_id}") for name, one in submitted.items()}
        return [(left | outcomes)[job.name] for job in jobs]

    def _ended(self, job: Job, submitted: submitit.Job) -> Outcome:
        if (summary := job.summary) is not None:
            return Outcome(job.name, "finished", summary=summary)
        if submitted.exception() is None and submitted.result() == 0:
            return Outcome(job.name, "stopped")
        logs = [submitted.paths.stderr, submitted.paths.stdout]
        log = next((log for log in logs if log.is_file() and log.stat().st_size), logs[0])
        detail = reason(self._failure(job), log) if log.is_file() else str(submitted.exception())
        return Outcome(job.name, "failed", f"{detail} (see {log})")

    def _failure(self, job: Job) -> Path:
        return self.logs / f"{job.name}.failure"
