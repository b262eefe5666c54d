"""Closing network connections of this process: gloo cannot abort a collective, but it fails without connections."""

import os
import socket
from contextlib import suppress
from pathlib import Path


def open_connections() -> dict[str, int]:
    """The sockets of this process: Linux's name → file descriptor."""
    found: dict[str, int] = {}
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if (name := os.readlink(link)).startswith("socket:"):
                found[name] = int(link.name)
    return found


def cut_connections_but(spared: dict[str, int]) -> None:
    """Shut down all TCP connections except those in `spared`; threads waiting on them get an error."""
    for name, descriptor in open_connections().items():
        if name in spared:
            continue
        with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
            network = copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM
            if network and not copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                copy.shutdown(socket.SHUT_RDWR)
