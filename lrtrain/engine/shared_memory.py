"""All-to-all between the processes of one host through shared memory.

gloo sends by TCP with a thread that competes with computing threads: on busy cores one byte takes up to 4 ms.
Here each process copies a piece into its shared memory, notifies the others by a byte on a socket (0.01 ms),
and copies their pieces.
"""

import os
import socket
import uuid
from mmap import mmap
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

SLOT = 2**21
"""Bytes of a slot: two slots per process fit into the CPU's caches."""


class SharedMemory:
    """The shared memory of the processes of a group on one host: two slots each, filled alternately.

    A slot is refilled two pieces later. All others have read it by then: they announce their next piece only after
    reading, and this process has waited for that announcement.
    """

    def __init__(self, group: dist.ProcessGroup):
        """A collective of the group."""
        self.rank, self.turn = group.rank(), 0
        self.sockets = _sockets(group)
        mine = os.memfd_create("lrtrain")
        os.truncate(mine, 2 * SLOT)
        for one in self.sockets.values():
            socket.send_fds(one, [b"."], [mine])
        self.slots = {self.rank: _slots(mine)}
        for k, one in self.sockets.items():
            _, (theirs,), *_ = socket.recv_fds(one, 1, 1)
            self.slots[k] = _slots(theirs)

    def exchange(self, give: Tensor, take: Tensor) -> None:
        """Send `give[k]` to process k of the group and receive `take[k]` from it, except for this process; both
        (processes × n).

        Raises:
            RuntimeError: if a process has ended, or does not answer within the group's timeout.
        """
        alike = give.stride(0) == 0  # expanded: all processes read the same piece
        rows = 1 if alike else len(give)
        width = SLOT // (rows * give.element_size())
        for start in range(0, give.shape[1], width):
            piece = slice(start, start + width)
            self.turn = 1 - self.turn
            mine = self._shown(self.rank, rows, give[0, piece])
            for k in [self.rank] if alike else self.sockets:
                mine[0 if alike else k].copy_(give[k, piece])
            for k, one in self.sockets.items():
                _tell(one, k)
            for k, one in self.sockets.items():
                _wait(one, k)
                take[k, piece].copy_(self._shown(k, rows, give[0, piece])[0 if alike else self.rank])

    def _shown(self, k: int, rows: int, like: Tensor) -> Tensor:
        """The (rows × n) in the current slot of process k, with the dtype and width of `like`."""
        return self.slots[k][self.turn].view(like.dtype)[: rows * len(like)].view(rows, len(like))


def on_one_host(group: dist.ProcessGroup) -> bool:
    """Whether the processes of the group can share memory and connect by abstract socket names; a collective."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = (boot.read_text(), os.readlink("/proc/self/ns/net")) if boot.exists() else None  # on Linux alone
    found: list[object] = [None] * group.size()
    dist.all_gather_object(found, here, group=group)
    return here is not None and all(one == here for one in found)


def _sockets(group: dist.ProcessGroup) -> dict[int, socket.socket]:
    """A connection to each other process of the group."""
    rank, size = group.rank(), group.size()
    found: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(b"\0lrtrain" + uuid.uuid4().bytes)  # an abstract name, without a file
        door.listen(size)
        names = [b""] * size
        dist.all_gather_object(names, door.getsockname(), group=group)
        for k in range(rank):
            found[k] = socket.socket(socket.AF_UNIX)
            found[k].connect(names[k])
            found[k].send(bytes([rank]))
        for _ in range(rank + 1, size):
            one, _ = door.accept()
            found[one.recv(1)[0]] = one
    timeout = group._get_backend(torch.device("cpu")).options._timeout
    for one in found.values():
        one.settimeout(timeout.total_seconds())
    return found


def _slots(file: int) -> Tensor:
    """The two slots of memory mapped from this file descriptor, which is closed."""
    memory = mmap(file, 2 * SLOT)
    os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8).view(2, SLOT)


def _tell(one: socket.socket, k: int) -> None:
    """Notify process k that this process's piece is ready."""
    try:
        one.send(b".")
    except ConnectionError as error:
        raise RuntimeError(f"process {k} of the group has ended") from error


def _wait(one: socket.socket, k: int) -> None:
    """Wait until process k has announced its piece."""
    try:
        told = one.recv(1)
    except TimeoutError as error:
        raise RuntimeError(f"timed out waiting for process {k} of the group") from error
    except ConnectionError:
        told = b""
    if not told:
        raise RuntimeError(f"process {k} of the group has ended")
