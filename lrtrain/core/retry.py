"""Reading that outlives a passing fault of a disk or a network file system."""

import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from lrtrain.errors import RunFailed

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0, 8.0)  # seconds before a file is read again

T = TypeVar("T")


def retried(read_from: Callable[[int], Iterator[T]], file: object) -> Iterator[T]:
    """The items of `read_from(0)`; after an I/O error it goes on with `read_from(number of items had)`.

    An error of the system's (it has an errno: EIO, ESTALE, …) says nothing about the content. One that a decoder
    raises (it has none) does, and is raised at once.

    Raises:
        RunFailed: naming `file`, if the error does not pass.
        FileNotFoundError: if it is not there.
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
