"""What happens to others when something goes wrong on one: real processes, real signals, real limits of a disk."""

import itertools
import math
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from crew import Command, crew, together, train
from launching import ROOT, command
from offline import history, segments
from runs import gap, logged_steps, losses, wait_for, workers
from torch import Tensor
from torch.nn import Embedding

from lrtrain.checkpoint.checkpointer import damage_of, whole_checkpoints
from lrtrain.checkpoint.meta import read_meta

pytestmark = pytest.mark.full

ENDLESS = ["train.steps=100000", "schedule=constant", "param.execution=factored"]


def start(overrides: list[str], processes: int, output: Path) -> subprocess.Popen:
    """The user's command, running; what it says goes to `output`."""
    process = subprocess.Popen(
        command(overrides, processes), cwd=output.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with output.open("w") as file:
        subprocess.Popen(["cat"], stdin=process.stdout, stdout=file)  # no limit of the run's files is one of this
    return process


def at_most(process: int, size: int) -> None:
    """Let a running process write no file beyond so many bytes, as on a full disk."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_disk_that_fills_up_does_not_end_a_run_and_its_last_checkpoint_decides_how_it_ends(tmp_path: Path, tiny):
    """Full: it goes on and says so once. Room again: every row is there. Full at the end: it does not end with 0."""
    run, output = tmp_path / "run", tmp_path / "output"
    job = [*tiny, *ENDLESS, f"run.dir={run}", "spectra=light", "spectra.every=5", "checkpoint.every=10"]
    process = start(job, 1, output)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: logged_steps(run) > 12, process)
    size = metrics.stat().st_size
    at_most(process.pid, 1000)

    said = lambda: output.read_text()  # noqa: E731
    wait_for(lambda: "the checkpoint of step" in said() and said().count("spectra") > 3, process)
    assert metrics.stat().st_size <= size + 9_000
    assert said().count("metrics.jsonl cannot be written: [Errno 27] File too large") == 1
    assert said().count("spectra/ cannot be written") == 1
    at_most(process.pid, resource.RLIM_INFINITY)
    steps = logged_steps(run)
    wait_for(lambda: logged_steps(run) > steps + 12, process)
    assert [*losses(run)] == [*range(1, 1 + len(losses(run)))]

    kept = whole_checkpoints(run / "checkpoints")[-1]
    at_most(process.pid, 1000)
    process.terminate()
    assert process.wait(60) == 1
    kept = whole_checkpoints(run / "checkpoints")[-1]
    assert f"but its checkpoint could not be saved; the last good checkpoint is {kept}" in said()
    assert "Traceback" not in said()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 6 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(disk: Path) -> Path:
    """Leave no room; returns the file that takes it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def test_wandb_on_a_full_disk_costs_a_run_nothing_but_its_charts(tmp_path: Path, disk: Path, tiny):
    run, output = disk / "run", tmp_path / "output"
    job = [*tiny, *ENDLESS, f"run.dir={run}", "tracking=wandb", "spectra=light", "spectra.every=2"]
    process = start([*job, "checkpoint.every=5"], 1, output)
    wait_for(lambda: bool(whole_checkpoints(run / "checkpoints")) and logged_steps(run) > 8, process)
    before = losses(run)
    ballast = fill_up(disk)
    said = lambda: output.read_text()  # noqa: E731
    wait_for(lambda: "the checkpoint of step" in said() and "wandb failed" in said(), process)
    assert whole_checkpoints(run / "checkpoints")
    ballast.unlink()
    process.terminate()
    assert process.wait(60) == 0 and "the checkpoint is saved" in said()
    assert "Traceback" not in said() and said().count("wandb failed with OSError(28") == 1
    kept = whole_checkpoints(run / "checkpoints")[-1]
    assert damage_of(kept) is None and max(losses(run)) == read_meta(kept).step == len(losses(run)) > len(before)
    (charts,) = segments(run)
    assert [step for step, _ in history(charts, "train/loss")][: len(before) - 1] == [*before][:-1]  # it holds the last


def test_a_run_that_is_stopped_keeps_its_directory_and_goes_on(tmp_path: Path, tiny, launch):
    run, output = tmp_path / "run", tmp_path / "output"
    job = [*tiny, *ENDLESS, f"run.dir={run}", "resume=auto"]
    process = start(job, 2, output)
    wait_for(lambda: logged_steps(run) > 3, process)
    ranks = workers(process)
    for worker in ranks.values():
        os.kill(worker, signal.SIGSTOP)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    second = launch(job, 2)
    assert second.returncode == 2 and f"run.dir={run} is in use by a run that has not ended" in second.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    for worker in ranks.values():
        os.kill(worker, signal.SIGCONT)
    steps = logged_steps(run)
    wait_for(lambda: logged_steps(run) > steps + 3, process)
    process.terminate()  # as a scheduler does: torchrun hands it on
    assert process.wait(120) == 1
    assert re.search(r"stopped by SIGTERM at step \d+ of 100000; the checkpoint is saved", output.read_text())
    assert max(losses(run)) == int(whole_checkpoints(run / "checkpoints")[-1].name.removeprefix("step-"))


def test_a_process_that_is_stopped_is_named_when_the_others_have_waited_long_enough(tmp_path: Path, tiny):
    run, output = tmp_path / "run", tmp_path / "output"
    process = start([*tiny, *ENDLESS, f"run.dir={run}", "train.timeout_minutes=0.1"], 2, output)
    wait_for(lambda: logged_steps(run) > 3, process)
    time.sleep(2)  # two beats: it has said where it is
    ranks = workers(process)
    os.kill(ranks[1], signal.SIGSTOP)
    wait_for(lambda: "no sign of life" in output.read_text(), process)
    os.kill(ranks[1], signal.SIGKILL)  # torchrun would, after 30 seconds
    assert process.wait(60) == 1
    (sentence,) = [line for line in output.read_text().splitlines() if "no sign of life" in line]
    assert re.fullmatch(
        rf"no sign of life for train.timeout_minutes=0.1 of process 1 \(host \S+, pid {ranks[1]}\) at step \d+ in .+, "
        rf"while process 0 is \(host \S+, pid {ranks[0]}\) at step \d+ in \w+ of \w+.py:\w+; go on with .*resume=auto",
        sentence,
    )


def hang_at_step_3(overrides: list[str]) -> None:
    """Process 1 never comes back from the forward pass of step 3."""
    forward = Embedding.forward
    calls = itertools.count(1)

    def hang(self: Embedding, rows: Tensor) -> Tensor:
        if os.environ["RANK"] == "1" and torch.is_grad_enabled() and next(calls) == 3:
            time.sleep(1000)
        return forward(self, rows)

    Embedding.forward = hang
    train(overrides)


def test_a_process_that_lives_but_does_not_come_is_named_with_where_it_is(tmp_path: Path, tiny):
    run = tmp_path / "run"
    job = [*tiny, *ENDLESS, f"run.dir={run}", "train.timeout_minutes=0.08", "train.micro_batch_size=4"]
    first, second = crew(hang_at_step_3, (job,), tmp_path)
    first.join(120)
    second.kill()
    assert first.exitcode == 1
    assert re.search(
        r"RunFailed: .+ did not end within twice train.timeout_minutes=0.08 on process 0 at step 3, while there is "
        rf"process 1 \(host \S+, pid {second.pid}\) at step 3 in loss.py:",
        (tmp_path / "0.txt").read_text(),
    )


def spoil_step_3(jobs: list[list[str]], spoiled: list[int]) -> None:
    """In each job one process's gradient at step 3 is not a number; its loss is."""
    forward = Embedding.forward
    for job, culprit in zip(jobs, spoiled, strict=True):
        calls = itertools.count(1)

        def spoil(self: Embedding, rows: Tensor, calls=calls, culprit=culprit) -> Tensor:
            out = forward(self, rows)
            if os.environ["RANK"] == str(culprit) and torch.is_grad_enabled() and next(calls) == 3:
                out.register_hook(lambda gradient: gradient * math.nan)
            return out

        Embedding.forward = spoil
        train(job)


ENGINES = {
    "fsdp": ["engine=fsdp"],
    "ddp": ["engine=ddp"],
    **{
        f"zero{stage}": ["engine=deepspeed", f"engine.zero_stage={stage}", "engine.persist_below=0"]
        for stage in (1, 2, 3)
    },
}


def test_a_gradient_that_is_no_number_on_one_process_skips_the_step_on_all(tmp_path: Path, tiny):
    """Under each engine, wherever it is: that step is skipped, and the same losses follow as on a single process."""
    base = [*tiny, "train.steps=6", "param.execution=factored"]
    spoiled = [("fsdp-first", "fsdp", 0), *((engine, engine, 1) for engine in ENGINES)]
    jobs = [
        [*base, *ENGINES[engine], f"run.dir={tmp_path}/{run}", "train.micro_batch_size=4"] for run, engine, _ in spoiled
    ]
    alone = [*base, f"run.dir={tmp_path}/alone", "train.micro_batch_size=8"]
    together(spoil_step_3, ([alone], [0]), tmp_path, 1)
    together(spoil_step_3, (jobs, [culprit for *_, culprit in spoiled]), tmp_path)
    said = (tmp_path / "0.txt").read_text()
    assert said.count("step 3 skipped: its loss or gradient is not finite") == 1 + len(jobs)
    expected = losses(tmp_path / "alone")
    assert len(expected) == 6 and all(math.isfinite(loss) for loss in expected.values())
    for engine in ENGINES:
        assert gap(losses(tmp_path / engine), expected) < 2e-5, engine
    assert gap(losses(tmp_path / "fsdp-first"), losses(tmp_path / "fsdp")) == 0


ELSEWHERE = """
import os, runpy, sys
os.chdir(sys.argv.pop(1) + os.environ["RANK"])
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_path_that_is_missing_on_one_host_is_said_once_and_ends_all(tmp_path: Path, tiny, corpus: Path):
    """Two working folders stand for two hosts, of which one has no data."""
    for host in ("0", "1"):
        (tmp_path / host).mkdir()
    (tmp_path / "0" / "corpus").symlink_to(corpus)
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    job = [*tiny, "data.path=corpus", f"run.dir={tmp_path}/run"]
    script = [f"{tmp_path}/", str(ROOT / "launch" / "pretrain.py")]
    done = Command(tmp_path / "elsewhere.py", [*script, *job], tmp_path, 2).result()
    assert done.returncode == 2
    sentence = (
        r"^on process 1 \(host \S+\) alone: data.path=corpus matches no file; give files, folders or globs of .*$"
    )
    assert len(re.findall(sentence, done.stderr, re.MULTILINE)) == 1
    assert not (tmp_path / "run").exists() and "matches no file" not in done.stdout
    assert "Traceback" not in done.stderr
