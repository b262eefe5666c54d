"""Batches read ahead on threads, while steps run."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lrtrain.data.loader import READ_AHEAD, TrainData

T = TypeVar("T")


@dataclass(frozen=True)
class Read:
    """This process's rows of a batch."""

    rows: Tensor
    """(sequences, seq_len + 1), on the device."""
    unreadable: int
    """Faults in the training data on this process until here."""
    copied: torch.cuda.Event | None = None
    """When the copy to a GPU is done."""


class Reader:
    """Reads batches in order, up to `READ_AHEAD` of them before they are due.

    Args:
        positions: of the first sequence of each batch.
        read: this process's rows of the batch at a position.
    """

    def __init__(self, data: TrainData, positions: Iterator[int], read: Callable[[int], Tensor], device: torch.device):
        self.data = data
        self.positions = positions
        self.read = read
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: deque[Future[Read]] = deque()
        """The batches to come; the first is the next."""
        self._go_on()

    def take(self) -> Tensor:
        """The rows of the next batch, which must be read by now; another one is read from here on.

        Raises:
            Whatever reading them raised.
        """
        found = self.ahead[0].result()
        self.ahead.popleft()
        self._go_on()
        if found.copied is not None:
            found.copied.wait()
            found.rows.record_stream(torch.cuda.current_stream())
        return found.rows

    def _go_on(self) -> None:
        for position in self.positions:
            self.ahead.append(in_background(self._reading(position, self.ahead[-1] if self.ahead else None)))
            if len(self.ahead) >= READ_AHEAD:
                return

    def _reading(self, position: int, before: Future[Read] | None) -> Callable[[], Read]:
        def read() -> Read:
            if before is not None:
                before.result()  # batches are read in order, and none after one that could not be read
            rows = self.read(position)
            unreadable = self.data.faults.count
            if self.stream is None:
                return Read(rows, unreadable)
            copied = torch.cuda.Event()
            with torch.cuda.stream(self.stream):
                rows = rows.pin_memory().to(self.device, non_blocking=True)
                copied.record()
            return Read(rows, unreadable, copied)

        return read


def in_background(call: Callable[[], T]) -> Future[T]:
    """A future of `call`'s result, run on a daemon thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
