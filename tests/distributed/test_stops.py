"""Whatever ends a run from outside, it is saved: real signals to real processes, and a torchrun that is killed."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from crew import Command
from launching import ROOT, command
from runs import logged_steps, losses, start, wait_for, workers

from lrtrain.checkpoint.checkpointer import damage_of, whole_checkpoints

pytestmark = pytest.mark.full

ENDLESS = ["train.steps=100000", "schedule=constant", "param.execution=factored", "resume=auto"]


def saved_at(run: Path) -> int:
    """The step of the newest checkpoint, which is sound, and the last that is logged."""
    newest = whole_checkpoints(run / "checkpoints")[-1]
    assert damage_of(newest) is None
    step = int(newest.name.removeprefix("step-"))
    assert max(losses(run)) == step
    return step


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_any_process_saves_and_is_named(tmp_path: Path, tiny: list[str], name: str):
    if signal.getsignal(signal.Signals[name]) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup, and so it is by what the tests start")
    run = tmp_path / "run"
    process = start([*tiny, *ENDLESS, f"run.dir={run}"], 2, tmp_path)
    wait_for(lambda: logged_steps(run) > 2, process)
    os.kill(process.members[1].pid, signal.Signals[name])
    assert process.wait(60) == 0
    said, _ = process.outputs()
    assert f"stopped by {name} at step {saved_at(run)} of 100000; the checkpoint is saved" in said


def test_a_hangup_of_torchrun_under_nohup_saves(tmp_path: Path, tiny: list[str]):
    """torchrun handles the signal that nohup ignores, and hands it on."""
    run, output = tmp_path / "run", tmp_path / "output"
    line = ["nohup", *command([*tiny, *ENDLESS, f"run.dir={run}"], 2)]
    with output.open("w") as file:
        process = subprocess.Popen(line, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    wait_for(lambda: logged_steps(run) > 2, process)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert f"stopped by SIGHUP at step {saved_at(run)} of 100000" in output.read_text()


def test_workers_whose_torchrun_is_killed_save_and_end_within_a_minute(tmp_path: Path, tiny: list[str]):
    run, output = tmp_path / "run", tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            command([*tiny, *ENDLESS, f"run.dir={run}"], 2), cwd=tmp_path, stdout=file, stderr=file
        )
    wait_for(lambda: logged_steps(run) > 2, process)
    orphans = [*workers(process).values()]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in orphans):
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    said = output.read_text()
    assert re.search(
        rf"stopped by the end of torchrun at step {saved_at(run)} of 100000; the checkpoint is saved", said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("stream", ["stdout", "stderr", "nobody reads"])
def test_a_run_whose_output_goes_nowhere_ends_well(tmp_path: Path, tiny: list[str], stream: str):
    run = tmp_path / "run"
    line = command([*tiny, "train.steps=3", f"run.dir={run}", "checkpoint.every=1"], 1)
    if stream == "nobody reads":
        read, write = os.pipe()
        os.close(read)
        streams = {"stdout": write, "stderr": write}
    else:
        streams = {stream: os.open("/dev/full", os.O_WRONLY)}
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    assert subprocess.run(line, cwd=tmp_path, env=environment, timeout=240, **streams).returncode == 0
    assert saved_at(run) == 3 and (run / "summary.json").is_file()


def test_a_picture_that_cannot_be_drawn_fails_no_run(tmp_path: Path, tiny: list[str]):
    script = tmp_path / "without_pictures.py"
    script.write_text(
        "import runpy, sys\n"
        "import lrtrain.analysis.plots as plots\n"
        "def plot_run(run): raise ZeroDivisionError('no picture today')\n"
        "plots.plot_run = plot_run\n"
        f"runpy.run_path({str(ROOT / 'launch' / 'pretrain.py')!r}, run_name='__main__')\n"
    )
    done = Command(script, [*tiny, "train.steps=1", f"run.dir={tmp_path}/run"], tmp_path).result()
    assert done.returncode == 0 and "no picture today" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
