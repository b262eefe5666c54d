"""What a power cut would leave of a folder that processes write to: a record of all that they sync, played back.

A disk owes nothing but what was synced: of a file its content at its last fsync, of a folder the names that it had at
its own. Everything else may be lost, which is the worst case; or, as on ext4, all names are there, and files that were
never synced have no bytes.
"""

import fcntl
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch


class Sync(NamedTuple):
    """One fsync in the order of all processes."""

    inode: int
    content: bytes | dict[str, int]
    """Of a file its bytes, of a folder name → inode."""
    names: dict[str, tuple[int, bool]]
    """All that had a name below the root by then: path → (inode, whether it is a folder)."""


def recorded(job: Callable[..., None], arguments: tuple[Any, ...], root: Path, record: Path) -> None:
    """Run `job(*arguments)` and append to `record` all that it syncs below `root`; several processes may at once."""
    fsync, held = os.fsync, {}

    def hold(path: str) -> None:
        """Keep an inode from being given to another file as long as this process lives."""
        if (inode := os.stat(path).st_ino) not in held:
            held[inode] = os.open(path, os.O_RDONLY)

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        path = f"/proc/self/fd/{descriptor}"
        if not Path(os.readlink(path)).is_relative_to(root):
            return
        hold(path)
        with record.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            found = os.stat(path)
            if stat.S_ISDIR(found.st_mode):
                entries = {entry.name: entry.inode() for entry in os.scandir(path)}
                for name in entries:
                    hold(f"{path}/{name}")
                pickle.dump(Sync(found.st_ino, entries, names_below(root)), file)
            else:
                pickle.dump(Sync(found.st_ino, Path(path).read_bytes(), names_below(root)), file)

    with patch.object(os, "fsync", noted):
        job(*arguments)


def names_below(root: Path) -> dict[str, tuple[int, bool]]:
    """See `Sync.names`."""
    return {str(path.relative_to(root)): (path.stat().st_ino, path.is_dir()) for path in root.rglob("*")}


def syncs(record: Path) -> list[Sync]:
    """What was recorded."""
    found: list[Sync] = []
    with record.open("rb") as file:
        while True:
            try:
                found.append(pickle.load(file))
            except EOFError:
                return found


def leave(done: list[Sync], root_inode: int, into: Path, names: bool) -> None:
    """Make the folder that a power cut right after the last of `done` leaves, with all `names` or only synced ones."""
    disk = {sync.inode: sync.content for sync in done}
    into.mkdir(parents=True)
    if names:
        for path, (inode, is_folder) in sorted(done[-1].names.items()):
            (into / path).mkdir() if is_folder else (into / path).write_bytes(bytes_of(disk, inode))
        return
    folders = {inode for sync in done for inode, is_folder in sync.names.values() if is_folder}
    stack = [(root_inode, into)]
    while stack:
        folder, place = stack.pop()
        entries = disk.get(folder, {})
        assert isinstance(entries, dict)
        for name, inode in entries.items():
            if inode in folders:
                (place / name).mkdir()
                stack.append((inode, place / name))
            else:
                (place / name).write_bytes(bytes_of(disk, inode))


def bytes_of(disk: dict[int, bytes | dict[str, int]], inode: int) -> bytes:
    found = disk.get(inode, b"")
    assert isinstance(found, bytes)
    return found
