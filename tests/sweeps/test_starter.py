"""Processes that begin as the one before them did, whatever that one has done."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lrtrain.sweeps.starter import Starter

KEPT: list[str] = []


def add(name: str) -> dict[str, object]:
    KEPT.append(name)
    return {"kept": [*KEPT], "pid": os.getpid()}


def end(how: str) -> dict[str, object]:
    match how:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            raise SystemExit(3)
        case "raised":
            raise ValueError("wrong")
    return {"fine": True}


def save_at_sigterm(folder: Path) -> dict[str, object]:
    signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or os._exit(0))
    (folder / "running").touch()
    time.sleep(60)
    return {}


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_begins_without_what_the_one_before_has_done():
    starter = Starter(add)
    found = []
    for name in ("first", "second"):
        started = starter.start(name)
        assert started.ended(30)
        found.append(started.result)
    assert [one["kept"] for one in found] == [["first"], ["second"]] and KEPT == []
    assert len({os.getpid(), *(one["pid"] for one in found)}) == 3


@pytest.mark.parametrize(
    "how, told", [("killed", "killed by SIGKILL"), ("exit", "ended with code 1"), ("raised", "ended with code 1")]
)
def test_a_process_that_ends_without_a_result_is_told_of_and_the_next_one_begins(how: str, told: str):
    starter = Starter(end)
    started = starter.start(how)
    assert started.ended(30) and started.result == {"failed": told}
    started = starter.start("well")
    assert started.ended(30) and started.result == {"fine": True}


def test_a_process_killed_before_it_does_anything_has_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lrtrain.sweeps.starter._work", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    started = Starter(end).start("well")
    assert started.ended(30) and started.result == {"failed": "killed by SIGKILL"}


def test_a_process_gets_the_signals_that_it_is_sent(tmp_path: Path):
    started = Starter(save_at_sigterm).start(tmp_path)
    wait_for((tmp_path / "running").exists)
    assert not started.ended(0)
    started.signal(signal.SIGTERM)
    assert started.ended(30) and (tmp_path / "saved").exists()


def test_a_process_whose_sweep_was_killed_is_asked_to_save(tmp_path: Path):
    sweep = os.fork()
    if sweep == 0:
        Starter(save_at_sigterm).start(tmp_path)
        time.sleep(60)
        os._exit(0)
    wait_for((tmp_path / "running").exists)
    os.kill(sweep, signal.SIGKILL)
    os.waitpid(sweep, 0)
    wait_for((tmp_path / "saved").exists)
