"""Running jobs in separate processes, several at a time, each with its share of the machine's cores or GPUs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from lrtrain.distributed.threads import keep_to, usable_cores
from lrtrain.sweeps.jobs import FAILURE, Job, Outcome
from lrtrain.sweeps.report import Tell

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
SAVING = 80  # seconds that torchrun gives its processes to save: less than the 90 between submitit's signal and the end
K = TypeVar("K")


@dataclass
class Running:
    """A running process, its slot, and its start time."""

    process: subprocess.Popen
    slot: int
    started: float


def start(command: Sequence[str], log: Path, slot: int, cores: Sequence[int], **environment: str) -> Running:
    """Start a command on some of the cores, with its output in `log` and its error message next to it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    failure_file(log).unlink(missing_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | own_environment(failure_file(log)) | environment,
            preexec_fn=partial(keep_to, cores),
            start_new_session=True,  # Ctrl-C reaches it through `run_parallel`, once
        )
    return Running(process, slot, time.monotonic())


def run_parallel(
    parallel: int,
    waiting: Callable[[], Iterable[K]],
    begin: Callable[[K, int], Running],
    ended: Callable[[K, Running], None],
) -> bool:
    """Keep `parallel` processes running until none is left to start; returns False if a signal stopped them.

    On SIGTERM or Ctrl-C, running processes save a checkpoint and exit.

    Args:
        waiting: returns what can be run now; called whenever a process has ended.
        begin: starts one in a free slot (0 … parallel − 1).
        ended: called for each process that has ended by itself.
    """
    free, running = [*range(parallel)], {}
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            for key in [key for key in waiting() if key not in running][: len(free)]:
                running[key] = begin(key, free.pop(0))
            if not running:
                return True
            key, one = next_to_end(running)
            free.append(one.slot)
            ended(key, one)
    except KeyboardInterrupt:
        return False
    finally:
        end_all(running.values())
        signal.signal(signal.SIGTERM, before)


def next_to_end(running: dict[K, Running]) -> tuple[K, Running]:
    """Wait until a process ends, and remove it from `running`."""
    while True:
        for key, one in running.items():
            if one.process.poll() is not None:
                return key, running.pop(key)
        time.sleep(0.1)


def end_all(running: Iterable[Running]) -> None:
    """Signal each process to save a checkpoint and exit, and wait."""
    for one in running:
        one.process.terminate()
    for one in running:
        one.process.wait()


def torchrun(job: Job, nproc: int, *options: str) -> list[str]:
    """The command line that runs a job on `nproc` processes of each machine."""
    where = options or ["--standalone"]
    sizes = [f"--nproc_per_node={nproc}", f"--shutdown-timeout={SAVING}"]
    return [sys.executable, "-m", "torch.distributed.run", *where, *sizes, str(PRETRAIN), *job.arguments]


def own_environment(failure: Path) -> dict[str, str]:
    """Environment variables for a job's processes, with the file for their error message."""
    return {FAILURE: str(failure), "HYDRA_FULL_ERROR": ""}  # which this process has set for itself


def failure_file(log: Path) -> Path:
    """The file for the error message of a process with this log."""
    return log.with_suffix(".failure")


class Torchruns:
    """Runs each job with its own torchrun of `nproc` processes, `parallel` jobs at a time."""

    def __init__(self, folder: Path, nproc: int, parallel: int):
        self.logs = folder / "logs"
        self.nproc = nproc
        self.parallel = parallel

    def run(self, jobs: list[Job], tell: Tell) -> list[Outcome]:
        """Run all jobs; on SIGTERM or Ctrl-C running jobs save, and the sweep ends."""
        named, started = {job.name: job for job in jobs}, []
        outcomes: dict[str, Outcome] = {}

        def begin(name: str, slot: int) -> Running:
            started.append(name)
            tell.starts(named[name])
            return self._start(named[name], slot)

        def ended(name: str, one: Running) -> None:
            outcomes[name] = self._ended(named[name], one.process.returncode)
            tell.ended(outcomes[name])

        run_parallel(self.parallel, lambda: [name for name in named if name not in outcomes], begin, ended)
        stopped = {name: self._ended(named[name], 0) for name in started if name not in outcomes}
        return [(stopped | outcomes).get(name, Outcome(name, "not started")) for name in named]

    def _start(self, job: Job, slot: int) -> Running:
        cores, gpus = usable_cores(), torch.cuda.device_count()
        visible = {}
        if gpus:
            inherited = os.environ.get("CUDA_VISIBLE_DEVICES")  # by id, of which `gpus` counts those that exist
            ids = inherited.split(",") if inherited else [*map(str, range(gpus))]
            share = [ids[(slot * self.nproc + i) % gpus] for i in range(self.nproc)]
            visible["CUDA_VISIBLE_DEVICES"] = ",".join(share)
        return start(torchrun(job, self.nproc), self._log(job), slot, cores[slot :: self.parallel] or cores, **visible)

    def _ended(self, job: Job, code: int) -> Outcome:
        if (summary := job.summary) is not None:
            return Outcome(job.name, "finished", summary=summary)
        if code == 0:
            return Outcome(job.name, "stopped")
        log = self._log(job)
        return Outcome(job.name, "failed", f"{reason(failure_file(log), log)} (see {log})")

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.name}.log"


def reason(failure: Path, log: Path) -> str:
    """The reason why a process failed: its error message, or else the last exception in its log."""
    if failure.is_file():
        return failure.read_text()
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b", line)]
    told = [line for line in errors if "ChildFailedError" not in line]
    return (told or lines or ["it ended without a word"])[-1]
