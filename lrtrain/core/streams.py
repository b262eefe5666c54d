"""Standard streams that never raise: if nobody reads them, a disk is full, or they cannot encode `→`."""

import io
import os
import sys
from typing import Any


class _Unfailing(io.RawIOBase):
    """A raw stream that writes what it can and drops the rest."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return self._raw.write(data) or len(data)
        except (OSError, ValueError):  # full disk, pipe without reader, closed stream
            return len(data)

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return not self._raw.closed and self._raw.isatty()


def never_fail_to_print() -> None:
    """Make printing never raise in this process: on a full device, with `| head`, on a closed stream, or for characters
    that the stream cannot encode (they are escaped). For entry points only."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, _unfailing(getattr(sys, name), descriptor))


def _unfailing(stream: Any, descriptor: int) -> Any:
    if stream is None:  # closed by the parent process: reserve the descriptor, or another file would get the output
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
        return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # python -u has no buffer
    if not isinstance(raw, io.RawIOBase) or isinstance(raw, _Unfailing):
        return stream  # captured in memory
    try:
        stream.flush()
    except (OSError, ValueError):
        pass
    buffered = io.BufferedWriter(_Unfailing(raw))
    return io.TextIOWrapper(buffered, stream.encoding, errors="backslashreplace", line_buffering=True)
