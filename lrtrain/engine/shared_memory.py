"""Tensors from process to process of one host, through memory that all of them see.

gloo sends by TCP, and by a thread that competes with those that compute: on busy cores one byte takes it up to 4 ms.
Here a process copies a piece of what it gives into memory of its own, tells the others by a byte on a socket (0.01 ms),
and copies theirs.
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
"""Bytes that a process shows at a time: two such slots of each process stay in the CPU's caches."""


class SharedMemory:
    """What the processes of a group on one host show each other: two slots each, filled in turn.

    A slot is filled again two pieces later. By then all others have read it: only after that they tell of their next
    piece, for which this process has waited.
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
        """Give `give[k]` to process k of the group, and put what it gives into `take[k]`, but for this process's own;
        both (processes × n).

        Raises:
            RuntimeError: if a process has ended, or does not come within the group's timeout.
        """
        alike = give.stride(0) == 0  # expanded: shown once for all
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
        """(rows × n) of what process k shows now, of the dtype and as wide as `like`."""
        return self.slots[k][self.turn].view(like.dtype)[: rows * len(like)].view(rows, len(like))


def on_one_host(group: dist.ProcessGroup) -> bool:
    """Whether the processes of the group can see the same memory, and sockets by their names; a collective."""
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
        door.bind(b"\0lrtrain" + uuid.uuid4().bytes)  # a name that is in no folder
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
    """(2 × SLOT) bytes of the memory that is this file, which is closed."""
    memory = mmap(file, 2 * SLOT)
    os.close(file)
    return torch.frombuffer(memory, dtype=torch.uint8).view(2, SLOT)


def _tell(one: socket.socket, k: int) -> None:
    """Let process k know that this one's piece is there."""
    try:
        one.send(b".")
    except ConnectionError as error:
        raise RuntimeError(f"process {k} of the group has ended") from error


def _wait(one: socket.socket, k: int) -> None:
    """Until process k has told of its piece."""
    try:
        told = one.recv(1)
    except TimeoutError as error:
        raise RuntimeError(f"timed out waiting for process {k} of the group") from error
    except ConnectionError:
        told = b""
    if not told:
        raise RuntimeError(f"process {k} of the group has ended")
