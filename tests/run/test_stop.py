"""What a run stops for."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from lrtrain.run.stop import StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    request = StopRequest()
    yield request
    request.restore()
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_each_signal_is_noted_by_its_name(stop: StopRequest, name: str):
    assert stop.signal is None
    assert signal.getsignal(signal.Signals[name]) != signal.SIG_DFL  # which would kill the tests
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.signal == name


def test_a_signal_that_was_blocked_while_the_process_started_is_noted():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)  # to this thread: others do not block it
    request = StopRequest()
    try:
        assert request.signal == "SIGUSR2"
    finally:
        request.restore()


def test_a_second_interrupt_interrupts(stop: StopRequest):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_hangup_that_nohup_ignores_stays_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal is None
        request.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_end_of_torchrun_is_noted_and_that_of_any_other_parent_is_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    by_hand = StopRequest()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    by_torchrun = StopRequest()
    assert by_torchrun.signal is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert by_torchrun.signal == "the end of torchrun" and by_hand.signal is None
    by_torchrun.restore()
    by_hand.restore()
