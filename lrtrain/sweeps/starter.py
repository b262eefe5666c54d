"""Child processes for the jobs of a sweep, forked from a helper process that has computed nothing and joined nothing.

When a job ends, by whatever cause, its memory, threads, connections and compiled code are gone.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from lrtrain.run.stop import STOPPING

LOOK_EVERY = 0.1  # seconds


class Started:
    """A child process that was started."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._pid: int | None = None
        self.result: Any = None
        """What `work` returned, or {"failed": how the process ended} if it returned nothing; None before that."""
        while self._pid is None:
            self._receive()

    def ended(self, seconds: float) -> bool:
        """Wait up to `seconds`; returns whether the process has ended."""
        while self._pipe.poll(seconds):
            if self._receive() == "end":
                return True
        return False

    def _receive(self) -> str:
        """Take one message, and return its kind."""
        kind, value = self._pipe.recv()
        if kind == "started":
            self._pid = value
        elif kind == "result":
            self.result = value
        else:
            self.result = self.result or {"failed": _ending(value)}
        return kind

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        assert self._pid is not None
        with suppress(ProcessLookupError):
            os.kill(self._pid, number)


class Starter:
    """Runs `work` in one child process after another. Create it before this process computes or joins a group: the
    children start in the state that this process has now."""

    def __init__(self, work: Callable[..., dict[str, Any]]):
        self._pipe, theirs = multiprocessing.Pipe()
        sys.stdout.flush()
        if os.fork() == 0:
            self._pipe.close()
            try:
                _serve(theirs, work)
            finally:
                os._exit(0)
        theirs.close()

    def start(self, *arguments: Any) -> Started:
        """Start `work(*arguments)`."""
        self._pipe.send(arguments)
        return Started(self._pipe)


def _serve(pipe: Connection, work: Callable[..., dict[str, Any]]) -> None:
    """The helper process: forks a child per request, until the process that requests them has ended."""
    parent = os.getppid()
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)  # the children install their own handlers
    while True:
        try:
            arguments = pipe.recv()
        except EOFError:
            return
        if (child := os.fork()) == 0:
            _work(pipe, work, arguments)
        pipe.send(("started", child))
        pipe.send(("end", _wait_for(child, parent)))


def _work(pipe: Connection, work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    """The child process: run `work`, send its result and exit."""
    code = 1
    try:
        pipe.send(("result", work(*arguments)))
        code = 0
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of a process group that others still wait in must not hold it up


def _wait_for(child: int, parent: int) -> int:
    """The exit code of a child. Sends it SIGTERM if `parent` has ended."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != parent:
            os.kill(child, signal.SIGTERM)
        time.sleep(LOOK_EVERY)


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
