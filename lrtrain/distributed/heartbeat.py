"""Heartbeats: each process regularly reports its position; a silent process is named, and the run ended.

A collective waits for a missing process (suspended, or its host is gone) without naming it. So a thread of each process
writes a note into the rendezvous store; the main process reads all notes, the others read the main process's. The
thread runs independently of the main thread: it works with any backend, and a busy process is not taken for a lost one.
"""

import itertools
import os
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from lrtrain.distributed.world import World, rendezvous
from lrtrain.errors import RunFailed

PACKAGE = Path(__file__).resolve().parents[1]
TORCH = Path(dist.__file__).parent
COLLECTIVES = ("collectives.py", "world.py")  # report their caller instead
OVER = "over"
BEFORE_NCCL = 80 / 60
"""Minutes of silence on GPUs at most: after 100 seconds NCCL's watchdog ends the process without naming another."""

_runs = itertools.count()


class Heartbeat:
    """The heartbeat of one run; a context that all processes enter and leave. Without effect for a single process.

    Args:
        minutes: time without a new note after which the run is ended, counted in beats of the reader, so that time in
            which the reader itself was suspended does not count.

    Raises:
        RunFailed: if a collective timed out within the context, with the position of each process.
    """

    def __init__(self, world: World, minutes: float):
        self.world = world
        self.told = f"train.timeout_minutes={minutes:g}"
        if world.device.type == "cuda" and minutes > BEFORE_NCCL:
            minutes, self.told = BEFORE_NCCL, f"{60 * BEFORE_NCCL:g} seconds"
        self.minutes = minutes
        self.every = min(10.0, 60 * minutes / 6)
        self.step = 0
        self._over = threading.Event()
        self._prefix = f"heartbeat {next(_runs)}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self.world.size > 1:
            # A separate connection, usable while the main thread waits for an answer on its own.
            self._store = dist.PrefixStore(self._prefix, rendezvous().clone())  # pyright: ignore[reportAttributeAccessIssue]
            self._store.set_timeout(timedelta(seconds=self.every))
            self._write(f"start {self._who()} at its start")
            dist.barrier()
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.world.size > 1:
            self._over.set()
            self._thread.join()
            if isinstance(error, RuntimeError) and "timed out" in str(error).lower():
                raise RunFailed(self._stuck(error)) from error

    def _run(self) -> None:
        watched = [*range(1, self.world.size)] if self.world.main else [0]
        last, silent = dict.fromkeys(watched, "") | self._read(watched), dict.fromkeys(watched, 0.0)
        for beat in itertools.count():
            if self._over.wait(self.every):
                return self._write(f"{OVER} {self._note()}")
            self._write(f"{beat} {self._note()}")
            now = last | self._read(watched)
            for other in watched:
                alive = now[other] != last[other] or now[other].startswith(OVER)
                silent[other] = 0.0 if alive else silent[other] + self.every
            last = now
            lost = [other for other in watched if silent[other] >= 60 * self.minutes]
            if lost:
                self._end({other: last[other] for other in lost})

    def _write(self, note: str) -> None:
        try:
            self._store.set(f"{self.world.dist_rank}", note)
        except RuntimeError:  # the store, or the process that hosts it, is gone
            pass

    def _read(self, processes: list[int]) -> dict[int, str]:
        """The notes of processes; empty if the store does not answer."""
        try:
            found = self._store.multi_get([f"{process}" for process in processes])
        except RuntimeError:
            return {}
        return {process: value.decode() for process, value in zip(processes, found, strict=True)}

    def _who(self) -> str:
        return f"(host {socket.gethostname()}, pid {os.getpid()})"

    def _note(self) -> str:
        """The identity and position of this process."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return f"{self._who()} at step {self.step + 1} in {place(frame)}"

    def _end(self, lost: dict[int, str]) -> None:
        """Print the silent processes, once, and end this process; torchrun or the scheduler ends the others."""
        self._tell(
            f"no sign of life for {self.told} of {_listed(lost)}, while process "
            f"{self.world.dist_rank} is {self._note()}"
        )
        os._exit(1)

    def _stuck(self, error: BaseException) -> str:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        frame = trace.tb_frame if trace is not None else None
        others = [other for other in range(self.world.size) if other != self.world.dist_rank]
        return (
            f"{place(frame)} did not end within twice {self.told} on process "
            f"{self.world.dist_rank} at step {self.step + 1}, while there is {_listed(self._read(others))}"
        )

    def _tell(self, sentence: str) -> None:
        try:
            first = self._store.add("told", 1) == 1
        except RuntimeError:
            first = True
        if first:
            print(f"{sentence}; go on with the same command and resume=auto", file=sys.stderr, flush=True)


def place(frame: FrameType | None) -> str:
    """The position of a thread, e.g. `all_reduce of train.py:_step`: the function of torch.distributed if it is in a
    collective, and the lrtrain function that called it."""
    collective = None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if collective is None and TORCH in path.parents:
            collective = frame.f_code.co_name
        if path.is_relative_to(PACKAGE) and path.name not in COLLECTIVES:
            ours = f"{path.name}:{frame.f_code.co_name}"
            return f"{collective} of {ours}" if collective else ours
        frame = frame.f_back
    return collective or "its start"


def _listed(notes: dict[int, str]) -> str:
    """`process 1 (host a, pid 7) at step 3 in …; process 2 …`."""
    return "; ".join(f"process {process} {note.partition(' ')[2]}" for process, note in notes.items())
