"""Graceful stops: a signal to any process stops all processes at the same step."""

import os
import signal
from types import FrameType

from lrtrain.distributed.collectives import max_over_ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals sent by schedulers, Ctrl-C, a closing terminal, and `--signal` of a batch system."""
TORCHRUN_ENDED = "the end of torchrun"


class StopRequest:
    """Records signals in `STOPPING` to this process, and the end of its torchrun; the loop decides when to stop.

    A second SIGINT interrupts immediately. SIGHUP stays ignored if it was (nohup).
    """

    def __init__(self) -> None:
        self._signal = 0
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        heeded = [one for one in STOPPING if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)  # signals that arrived during the start arrive now

    @property
    def signal(self) -> str | None:
        """The name of the signal that this process got; None if there was none."""
        return _named(self._number())

    def agreed(self) -> str:
        """The name of the signal that any process got; a collective, called after one got a signal."""
        return _named(int(max_over_ranks(self._number())[0])) or "nothing"

    def _number(self) -> int:
        if not self._signal and self._parent not in (None, os.getppid()):
            self._signal = signal.NSIG  # not a signal: torchrun was killed, and nobody would end this process
        return self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _named(number: int) -> str | None:
    if number == signal.NSIG:
        return TORCHRUN_ENDED
    return signal.Signals(number).name if number else None
