"""Jobs with a torchrun of their own: which GPUs they get, and how they end when Slurm wants the nodes back."""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from submitit.helpers import DelayedSubmission

from lrtrain.sweeps import processes, slurm
from lrtrain.sweeps.jobs import Job

# Stands for a torchrun: waits for its process, which takes a while to start, and a moment to save.
WAITS = """
import pathlib, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
pathlib.Path("running").touch()
sys.exit(worker.wait())
"""
SAVES_LATE = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit()
time.sleep(0.7)
signal.signal(signal.SIGUSR2, save)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
time.sleep(60)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    return Job("a", OmegaConf.create(), ["train.steps=1"])


@pytest.fixture
def signals() -> Iterator[None]:
    """Those that were there come back after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stand_in(code: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(slurm, "torchrun", lambda *_: [sys.executable, "-c", code, *arguments])


def signalled_when_it_runs() -> None:
    while not Path("running").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGUSR2)


def test_a_run_has_saved_before_submitit_queues_it_again(job: Job, signals, monkeypatch: pytest.MonkeyPatch):
    """submitit's handler interrupts the wait for torchrun, and leaves by SystemExit."""
    stand_in(WAITS, monkeypatch, SAVES_LATE)
    started = slurm.Torchrun(job, 1, Path("failure"))
    queued: list[DelayedSubmission] = []

    def requeue(*_) -> None:
        assert started.process is not None
        os.kill(started.process.pid, signal.SIGUSR2)  # as Slurm does; torchrun goes on waiting
        queued.append(started.checkpoint())
        assert Path("saved").exists()
        sys.exit(-1)

    signal.signal(signal.SIGUSR2, requeue)
    threading.Thread(target=signalled_when_it_runs, daemon=True).start()
    with pytest.raises(SystemExit):
        started()
    again = pickle.loads(pickle.dumps(queued[0])).function
    assert again.job == job and again.process is None


def test_a_signal_after_the_end_queues_the_job_too(job: Job, signals, monkeypatch: pytest.MonkeyPatch):
    stand_in("raise SystemExit(3)", monkeypatch)
    started = slurm.Torchrun(job, 1, Path("failure"))
    assert started() == 3
    assert started.checkpoint().function.job is job


def test_what_does_not_save_in_time_is_queued_again_too(job: Job, monkeypatch: pytest.MonkeyPatch):
    stand_in("import time; time.sleep(60)", monkeypatch)
    monkeypatch.setattr(slurm, "SAVING", 0.1)
    started = slurm.Torchrun(job, 1, Path("failure"))
    waiting = threading.Thread(target=started, daemon=True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which only a main thread may
    waiting.start()
    while started.process is None:
        time.sleep(0.01)
    assert started.checkpoint().function.job is job
    started.process.kill()
    waiting.join()


def test_torchrun_waits_for_a_checkpoint_within_the_90_seconds_that_submitit_leaves(job: Job):
    (given,) = (word for word in processes.torchrun(job, 2) if word.startswith("--shutdown-timeout="))
    assert 30 < int(given.partition("=")[2]) < 90


@pytest.mark.parametrize(
    "inherited, shares", [(None, ["0,1", "2,3", "0,1"]), ("4,7,GPU-1f,2", ["4,7", "GPU-1f,2", "4,7"])]
)
def test_jobs_share_out_the_gpus_that_their_sweep_was_given(
    job: Job, inherited: str | None, shares: list[str], monkeypatch: pytest.MonkeyPatch
):
    given: list[str] = []
    monkeypatch.setattr(processes, "start", lambda *_, **visible: given.append(visible["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if inherited is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    torchruns = processes.Torchruns(Path(), nproc=2, parallel=3)
    for slot in range(3):
        torchruns._start(job, slot)
    assert given == shares
