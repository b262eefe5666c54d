"""A program that goes on when nobody reads what it prints, or what it prints it on is full or knows no `→`."""

import io
import os
import sys
from typing import Any


class _Unfailing(io.RawIOBase):
    """Passes on what it is given as far as that is taken; the rest is dropped."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._raw.write(data) or len(data)
        except (OSError, ValueError):  # full, a pipe that nobody reads, closed
            return len(data)

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return not self._raw.closed and self._raw.isatty()


def never_fail_to_print() -> None:
    """From now on nothing that this process prints raises: a full device, `| head`, a closed stream, or a character
    that an ASCII stream does not have, which is escaped. For the entry points; a library leaves streams alone."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, _unfailing(getattr(sys, name), descriptor))


def _unfailing(stream: Any, descriptor: int) -> Any:
    if stream is None:  # closed by who started this: nothing else may get its descriptor, and with it what is printed
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer between
    if not isinstance(raw, io.RawIOBase) or isinstance(raw, _Unfailing):
        return stream  # somebody captures it in memory
    try:
        stream.flush()
    except (OSError, ValueError):
        pass
    buffered = io.BufferedWriter(_Unfailing(raw))
    return io.TextIOWrapper(buffered, stream.encoding, errors="backslashreplace", line_buffering=True)
