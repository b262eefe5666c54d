"""Reading with retries after temporary errors of a disk or network file system."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from lrtrain.errors import RunFailed

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0, 8.0)  # seconds before a file is read again

T = TypeVar("T")


def retried(read_from: Callable[[int], Iterator[T]], file: object) -> Iterator[T]:
    """The items of `read_from(0)`; after an I/O error it continues with `read_from(number of items so far)`.

    Only errors of the system (with an errno: EIO, ESTALE, …) are retried; errors of a decoder (without errno) mean
    damaged content and are raised immediately.

    Raises:
        RunFailed: if the error persists, naming `file`.
        FileNotFoundError: if the file does not exist.
    """
    had, failures = 0, 0
    while True:
        try:
            for item in read_from(had):
                yield item
                had, failures = had + 1, 0
            return
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno is None:
                raise
            if failures == len(PAUSES):
                raise RunFailed(f"{file} cannot be read ({error.strerror}); start again when it can") from error
            log.warning("%s cannot be read (%s); trying again", file, error.strerror)
            time.sleep(PAUSES[failures])
            failures += 1
