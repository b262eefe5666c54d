"""Processes that share the rows of parameters, simulated by threads."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from lrtrain.optim.rows import Rows

T = TypeVar("T")


class Meeting:
    """Where `size` threads exchange tensors."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: list[Tensor] = [torch.empty(0)] * size

    def all(self, index: int, part: Tensor) -> list[Tensor]:
        """What each thread gave."""
        self.given[index] = part.clone()
        self.barrier.wait()
        found = [*self.given]
        self.barrier.wait()
        return found


class SimulatedRows(Rows):
    """The rows of thread `index` among those of a parameter of this shape."""

    def __init__(self, shape: torch.Size, index: int, meeting: Meeting):
        self.shape, self.index, self.meeting = shape, index, meeting

    @property
    def processes(self) -> int:
        return self.meeting.size

    def sum(self, part: Tensor) -> Tensor:
        return part.copy_(torch.stack(self.meeting.all(self.index, part)).sum(0))

    def max(self, part: Tensor) -> Tensor:
        return part.copy_(torch.stack(self.meeting.all(self.index, part)).amax(0))

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self.meeting.all(self.index, rows))


def in_threads(size: int, work: Callable[[int, Meeting], T]) -> list[T]:
    """work(index, meeting) of each of so many threads."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda index: work(index, meeting), range(size)))
