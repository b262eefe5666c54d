"""Stopping in good order: a signal to any process ends the run at the same step on all of them."""

import os
import signal
from types import FrameType

from lrtrain.distributed.collectives import max_over_ranks

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What a scheduler, a keyboard, a terminal that closes, and `--signal` of a batch system send."""
TORCHRUN_ENDED = "the end of torchrun"


class StopRequest:
    """Notes the signals of `STOPPING` to this process, and the end of the torchrun that started it; what to do about it
    is agreed between the processes elsewhere.

    A second SIGINT interrupts at once. SIGHUP stays ignored where it was (nohup).
    """

    def __init__(self) -> None:
        self._signal = 0
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        heeded = [one for one in STOPPING if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heeded}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)  # what came while this process started comes now

    @property
    def signal(self) -> str | None:
        """What asked this process to stop, by name; None if nothing did."""
        return _named(self._number())

    def agreed(self) -> str:
        """What asked any process to stop, by name. A collective, once one process knows of something."""
        return _named(int(max_over_ranks(self._number())[0])) or "nothing"

    def _number(self) -> int:
        if not self._signal and self._parent not in (None, os.getppid()):
            self._signal = signal.NSIG  # no signal of its own: torchrun was killed, and nobody would end us
        return self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _named(number: int) -> str | None:
    if number == signal.NSIG:
        return TORCHRUN_ENDED
    return signal.Signals(number).name if number else None
