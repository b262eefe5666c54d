"""Jobs as processes of their own, several at a time, each with its share of the machine's cores or GPUs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from lrtrain.sweeps.jobs import FAILURE, Job, Outcome
from lrtrain.sweeps.report import Tell

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
K = TypeVar("K")


@dataclass
class Running:
    """A process, what it has of the machine, and since when."""

    process: subprocess.Popen
    slot: int
    started: float


def start(command: Sequence[str], log: Path, slot: int, cores: Sequence[int], environment: dict[str, str]) -> Running:
    """Begin a command on some of the cores, with its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
            start_new_session=True,  # Ctrl-C reaches it through `end_all`, once
        )
    return Running(process, slot, time.monotonic())


def next_to_end(running: dict[K, Running]) -> tuple[K, Running]:
    """Wait until one ends, and take it out of those that are running."""
    while True:
        for key, one in running.items():
            if one.process.poll() is not None:
                return key, running.pop(key)
        time.sleep(0.1)


def end_all(running: dict[K, Running]) -> None:
    """Let each save a checkpoint and end."""
    for one in running.values():
        one.process.terminate()
    for one in running.values():
        one.process.wait()


def torchrun(job: Job, nproc: int, *options: str) -> list[str]:
    """The command line that runs a job on `nproc` processes of each machine."""
    start = [sys.executable, "-m", "torch.distributed.run", *(options or ["--standalone"]), f"--nproc_per_node={nproc}"]
    return [*start, str(PRETRAIN), *job.overrides]


def own_environment(failure: Path) -> dict[str, str]:
    """What a job's processes are told beside their overrides: where to leave the sentence that they fail with."""
    return {FAILURE: str(failure), "HYDRA_FULL_ERROR": ""}  # which this process has set for itself


class Torchruns:
    """Runs each job as its own torchrun of `nproc` processes, `parallel` of them at a time."""

    def __init__(self, folder: Path, nproc: int, parallel: int):
        self.logs = folder / "logs"
        self.nproc = nproc
        self.parallel = parallel

    def run(self, jobs: list[Job], tell: Tell) -> list[Outcome]:
        """Every job; SIGTERM or Ctrl-C lets those that run save, and ends the sweep."""
        free, waiting, running = [*range(self.parallel)], [*jobs], {}
        outcomes: dict[str, Outcome] = {}
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while waiting or running:
                while waiting and free:
                    job, slot = waiting.pop(0), free.pop(0)
                    tell.starts(job)
                    running[job.name] = self._start(job, slot)
                name, ended = next_to_end(running)
                free.append(ended.slot)
                job = next(job for job in jobs if job.name == name)
                outcomes[name] = self._ended(job, ended.process.returncode)
                tell.ended(outcomes[name])
        except KeyboardInterrupt:
            started = [job for job in jobs if job.name in running]
            end_all(running)
            outcomes |= {job.name: self._ended(job, 0) for job in started}
        finally:
            signal.signal(signal.SIGTERM, before)
        return [outcomes.get(job.name, Outcome(job.name, "not started")) for job in jobs]

    def _start(self, job: Job, slot: int) -> Running:
        cores, gpus = sorted(os.sched_getaffinity(0)), torch.cuda.device_count()
        mine = cores[slot :: self.parallel] or cores
        environment = own_environment(self._failure(job))
        if gpus:
            share = [(slot * self.nproc + i) % gpus for i in range(self.nproc)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, share))
        self._failure(job).unlink(missing_ok=True)
        return start(torchrun(job, self.nproc), self._log(job), slot, mine, environment)

    def _ended(self, job: Job, code: int) -> Outcome:
        if (summary := job.summary) is not None:
            return Outcome(job.name, "finished", summary=summary)
        if code == 0:
            return Outcome(job.name, "stopped")
        return Outcome(job.name, "failed", f"{reason(self._failure(job), self._log(job))} (see {self._log(job)})")

    def _log(self, job: Job) -> Path:
        return self.logs / f"{job.name}.log"

    def _failure(self, job: Job) -> Path:
        return self.logs / f"{job.name}.failure"


def reason(failure: Path, log: Path) -> str:
    """Why a process failed: the sentence that it left, or else the last exception in its log."""
    if failure.is_file():
        return failure.read_text()
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception|Interrupt)\b", line)]
    told = [line for line in errors if "ChildFailedError" not in line]
    return (told or lines or ["it ended without a word"])[-1]
