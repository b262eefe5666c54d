"""Who is taken for gone, with a store that answers late."""

import os
import socket
import threading

import pytest
import torch
import torch.distributed as dist

from lrtrain.distributed.heartbeat import Heartbeat
from lrtrain.distributed.world import World


class Silenced(Exception):
    """In place of the end of the process."""


class Store:
    """What process 0 finds in the store beat by beat; None: it does not answer in time."""

    def __init__(self, beats: list[str | None], over: threading.Event):
        self.beats, self.over = iter(beats), over

    def set(self, key: str, note: str) -> None:
        pass

    def multi_get(self, keys: list[str]) -> list[bytes]:
        assert keys == ["1"]
        note = next(self.beats, "end")
        if note == "end":
            self.over.set()
        if note is None:
            raise RuntimeError("wait timeout")
        return [note.encode()]


def silent_after(beats: list[str | None], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """At which beat process 1 is taken for gone, with `train.timeout_minutes` of three beats; None: it is not."""
    heartbeat = Heartbeat(World(0, 0, 2, torch.device("cpu")), 0.0005)
    heartbeat.every = 0.01  # seconds
    store = Store(beats, heartbeat._over)
    heartbeat._store = store  # pyright: ignore[reportAttributeAccessIssue]

    def end(lost: dict[int, str]) -> None:
        assert lost.keys() == {1}
        raise Silenced

    monkeypatch.setattr(heartbeat, "_end", end)
    try:
        heartbeat._run()
    except Silenced:
        return len(beats) - len([*store.beats])
    return None


def test_a_store_that_answers_late_now_and_then_ends_nothing(monkeypatch: pytest.MonkeyPatch):
    assert silent_after(["0 a", None, "1 a", None, None, "2 a", "3 a"], monkeypatch) is None
    assert silent_after([None, None, "0 a", None, "1 a"], monkeypatch) is None  # late from the first beat on


def test_no_new_note_for_the_whole_time_ends_the_run_whether_the_store_answers_or_not(monkeypatch: pytest.MonkeyPatch):
    assert silent_after(["0 a", "1 a", "1 a", None, "1 a", "1 a"], monkeypatch) == 5
    assert silent_after(["0 a", None, None, None, None], monkeypatch) == 4


def test_a_process_that_has_left_the_run_is_not_missed(monkeypatch: pytest.MonkeyPatch):
    assert silent_after(["0 a", "over a", "over a", "over a", "over a", "over a"], monkeypatch) is None


def test_a_process_that_falls_silent_before_its_first_beat_has_said_who_it_is(monkeypatch: pytest.MonkeyPatch):
    store = dist.HashStore()
    monkeypatch.setattr("lrtrain.distributed.heartbeat.rendezvous", lambda: store)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    heartbeat = Heartbeat(World(1, 1, 2, torch.device("cpu")), 30)
    dist.PrefixStore(heartbeat._prefix, store).set("0", "what it waits for")
    with heartbeat:
        assert heartbeat._read([1]) == {1: f"start (host {socket.gethostname()}, pid {os.getpid()}) at its start"}
