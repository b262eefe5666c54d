"""A script that starts runs again learns whether that is worth it."""

import os
import signal
from pathlib import Path

import pytest
from runs import logged_steps, start, wait_for

from lrtrain.core.restart import UNFINISHED


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(UNFINISHED, str(tmp_path / "note"))
    return tmp_path / "note"


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGKILL])
def test_what_was_stopped_or_came_further_is_worth_another_start_until_it_has_finished(
    number: signal.Signals, note: Path, tiny: list[str], tmp_path: Path, launch
):
    job = [*tiny, f"run.dir={tmp_path}/run", "resume=auto"]
    every = 1 if number == signal.SIGKILL else 0  # it saves no more
    process = start([*job, "train.steps=5000", f"checkpoint.every={every}"], 1, tmp_path)
    wait_for(lambda: logged_steps(tmp_path / "run") > 1 and note.exists() == bool(every), process)
    os.kill(process.pid, number)
    process.wait()
    assert note.exists()
    done = launch([*job, "train.steps=1"])
    assert done.returncode == 0, done.stderr
    assert not note.exists()


def test_a_mistake_is_not(note: Path, tiny: list[str], launch):
    assert launch([*tiny, "param=sltran"]).returncode == 2
    assert not note.exists()
