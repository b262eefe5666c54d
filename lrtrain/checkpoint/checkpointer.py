"""Checkpoints that are whole or not there.

`checkpoints/step-00001000/` holds the shards of torch.distributed.checkpoint, `meta.json`, and `checksums.json` with
the CRC-32 of each, the marker of a whole checkpoint. It is written as `.step-00001000.partial` and renamed when every
process is done; a removal renames it away first. So whatever bears the final name and has the marker was complete,
wherever a process was killed; the checksums tell if it still is.
"""

import json
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lrtrain.checkpoint.meta import META, CheckpointMeta
from lrtrain.checkpoint.reader import TensorPlanner, TensorReader
from lrtrain.core.files import make_folder_durably, sync_folder, write_durably
from lrtrain.core.restart import note_unfinished
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.world import World
from lrtrain.errors import ConfigError

MARKER = "checksums.json"
NAME = re.compile(r"step-(\d{8})")


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a `checkpoints` folder, by ascending step."""
    return [checkpoint for checkpoint in _named(folder) if (checkpoint / MARKER).is_file()]


def _named(folder: Path) -> list[Path]:
    """What bears the final name of a checkpoint, by ascending step."""
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name)) if folder.is_dir() else []


def last_good(folder: Path) -> str:
    """What a run that failed can go on from, in words."""
    kept = whole_checkpoints(folder)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint in a `checkpoints` folder that is as it was written; None if there is none.

    Each one that is not is named on stderr.

    Raises:
        ConfigError: if there are some, but not one is as it was written.
    """
    found = _named(folder)
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        print(f"{checkpoint} is damaged and left aside: {damage}", file=sys.stderr, flush=True)
    if found:
        raise ConfigError(f"all checkpoints in {folder} are damaged; choose another run.name to start anew")
    return None


def find_checkpoint(path: Path, key: str = "resume=") -> Path:
    """The checkpoint that `path` means: itself, or the newest sound one of the run that it is the folder of.

    Args:
        key: what the path was given as, for the error.

    Raises:
        ConfigError: if there is none, or the one named is damaged.
    """
    if (path / MARKER).is_file():
        if damage := damage_of(path):
            raise ConfigError(f"{key}{path} is damaged: {damage}")
        return path
    found = newest_sound(path / "checkpoints")
    if found is None:
        raise ConfigError(f"{key}{path} holds no complete checkpoint; give a run directory or one of its checkpoints")
    return found


def damage_of(checkpoint: Path) -> str | None:
    """What differs from the checkpoint that was written, in a few words; None if nothing does. Reads all of it."""
    try:
        written = json.loads((checkpoint / MARKER).read_text())
    except (OSError, ValueError, RecursionError):
        written = None
    if not isinstance(written, dict) or META not in written:
        return f"{MARKER} is missing or not readable"
    found = checksums([file for name in written if (file := checkpoint / name).is_file()])
    differing = [name for name in written if found.get(name) != written[name]]
    return f"{differing[0]} is missing or not as it was written" if differing else None


def checksums(files: list[Path]) -> dict[str, int]:
    """File name → CRC-32; several files at a time."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(checksum, files), strict=True))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return crc


class Checkpointer:
    """Saves and loads the state of a run; one save is in flight at most."""

    def __init__(self, folder: Path, world: World, keep: int, keep_every: int | None, asynchronous: bool):
        self.folder = folder
        self.world = world
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        # The background save talks over a group of its own: its collectives must not mix with the training's.
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if asynchronous else None
        self.pending: Callable[[], Any] | None = None
        self.step = 0
        self.saved = True
        self.sound: set[str] = set()
        """Names of the checkpoints that were written or checked by this process: retention counts no others."""
        if world.main:
            make_folder_durably(folder)
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover)
            self.inode = folder.stat().st_ino

    def save(self, state: dict[str, Any], step: int, meta: CheckpointMeta) -> None:
        """Begin a checkpoint of `state` (copied before this returns); a collective. Waits for the one before.

        One that fails, as on a full disk, is told of and leaves those before it as they are; see `wait`.
        """
        self.wait()
        partial = self._partial(step)
        commit = self._committer(partial, self.folder / f"step-{step:08d}", meta)
        self.step = step
        if self.asynchronous:
            future = dcp.async_save(state, checkpoint_id=partial, process_group=self.group)
            assert isinstance(future, Future)
            self.pending = _then(future, commit).result
        else:
            self.pending = lambda: (dcp.save(state, checkpoint_id=partial), commit())
            self.wait()

    def wait(self) -> None:
        """Until the save in flight has ended on all processes, and `saved` tells of the last one whether it is on the
        disk. A collective."""
        if self.pending is None:
            return
        failure = _failure_of(self.pending)
        self.pending = None
        self.saved = sum_over_ranks(failure is not None)[0] == 0
        if not self.saved and self.world.main:
            shutil.rmtree(self._partial(self.step), ignore_errors=True)
            reason = failure or "another process could not write its part"
            print(f"the checkpoint of step {self.step} failed: {reason}", file=sys.stderr, flush=True)

    def load(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Fill the tensors of `state` in place from a checkpoint of any world size; a collective.

        Raises:
            ConfigError: with the reason if it cannot be loaded, as when it holds anything but tensors.
        """
        try:
            dcp.load(state, storage_reader=TensorReader(checkpoint), planner=TensorPlanner())
        except CheckpointException as error:
            raise ConfigError(f"{checkpoint} is not loaded: {_reasons(error)}") from error
        if checkpoint.parent.resolve() == self.folder.resolve():  # it was checked before, as any that is chosen
            self.sound.add(checkpoint.name)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _committer(self, partial: Path, final: Path, meta: CheckpointMeta) -> Callable[[], None]:
        text = meta.to_json()  # now: the run goes on, and changes its progress, while tensors are written

        def commit() -> None:
            if self.world.main:  # torch.distributed.checkpoint returns here only when all processes have written
                if self.folder.stat().st_ino != self.inode:
                    raise FileNotFoundError(f"{self.folder} was removed or moved")
                write_durably(partial / META, text)
                write_durably(partial / MARKER, json.dumps(checksums(sorted(partial.iterdir())), indent=1))
                if final.exists():
                    remove(final)
                partial.rename(final)
                sync_folder(self.folder)
                note_unfinished()
                self.sound.add(final.name)
                self._retire(final)

        return commit

    def _retire(self, saved: Path) -> None:
        """Remove what is older than the newest `keep` that are known to be sound, but not what was just saved.

        Whether the others are sound is not known, and costs reading them: they do not count.
        """
        whole = whole_checkpoints(self.folder)
        counted = [checkpoint for checkpoint in whole if checkpoint.name in self.sound]
        for old in whole[: whole.index(counted[-self.keep])] if len(counted) >= self.keep else []:
            step = int(NAME.fullmatch(old.name)[1])  # type: ignore[index]
            if old != saved and (not self.keep_every or step % self.keep_every):
                remove(old)


def _then(future: Future, action: Callable[[], None]) -> Future:
    """A future that is done when `action` has run after `future`."""
    chained: Future = Future()

    def run(done: Future) -> None:
        try:
            done.result()
            action()
            chained.set_result(None)
        except BaseException as error:
            chained.set_exception(error)

    future.add_done_callback(run)
    return chained


def _failure_of(save: Callable[[], Any]) -> str | None:
    """Why a save failed on this process, in one line; None if it did not."""
    try:
        save()
    except OSError as error:
        return str(error)
    except CheckpointException as error:
        return _reasons(error)
    return None


def _reasons(error: CheckpointException) -> str:
    """What went wrong on the processes, in one line."""
    return "; ".join(sorted({str(failure).splitlines()[0] for failure, _ in error.failures.values()}))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; from the first moment it is not taken for whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
