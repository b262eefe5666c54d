"""Atomic checkpoints: complete or absent.

`checkpoints/step-00001000/` holds the shards of torch.distributed.checkpoint, `meta.json`, and `checksums.json` with
the CRC-32 of each file, which marks a complete checkpoint. It is written as `.step-00001000.partial` and renamed when
every process is done; before deletion it is renamed again. So a folder with the final name and the marker was complete,
whenever a process was killed; the checksums detect later damage.
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
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lrtrain.checkpoint.meta import META, CheckpointMeta
from lrtrain.checkpoint.reader import TensorPlanner, TensorReader
from lrtrain.core.files import make_folder_durably, sync_folder, write_durably
from lrtrain.core.restart import note_unfinished
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.world import World
from lrtrain.errors import ConfigError

MARKER = "checksums.json"
NAME = re.compile(r"step-(\d{8})")
SHORT_WRITE = "a file could not be written whole, as on a full disk"
"""What torch's writer means by `unexpected pos 704 vs 598`."""


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a `checkpoints` folder, by ascending step."""
    return [checkpoint for checkpoint in _named(folder) if (checkpoint / MARKER).is_file()]


def _named(folder: Path) -> list[Path]:
    """The folders with the final name of a checkpoint, by ascending step."""
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name)) if folder.is_dir() else []


def last_good(folder: Path) -> str:
    """A phrase that names the last good checkpoint."""
    kept = whole_checkpoints(folder)
    return f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"


def newest_sound(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in a `checkpoints` folder; None if there is no checkpoint.

    Damaged ones are named on stderr.

    Raises:
        ConfigError: if all checkpoints are damaged.
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
    """The checkpoint at `path`, or the newest undamaged one of the run at `path`.

    Args:
        key: the option that gave the path, for the error.

    Raises:
        ConfigError: if there is none, or the checkpoint at `path` is damaged.
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
    """A description of the damage to a checkpoint; None if it is intact. Reads all of its files."""
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
    """Saves and loads the state of a run, with at most one save in flight."""

    def __init__(self, folder: Path, world: World, keep: int, keep_every: int | None, asynchronous: bool):
        self.folder = folder
        self.world = world
        self.keep = keep
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        # The background save has its own process group, so that its collectives do not mix with the training's.
        self.group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if asynchronous else None
        self.stager = pinned_stager() if asynchronous and world.device.type == "cuda" else None
        self.pending: Callable[[], Any] | None = None
        self.step = 0
        self.saved = True
        self.sound: set[str] = set()
        """Names of the checkpoints that this process wrote or verified: only these count for retention."""
        if world.main:
            make_folder_durably(folder)
            for leftover in folder.glob(".step-*"):
                shutil.rmtree(leftover)
            self.inode = folder.stat().st_ino

    def save(self, state: dict[str, Any], step: int, meta: CheckpointMeta) -> None:
        """Start a checkpoint of `state` (copied before this returns), after the previous one has ended; a collective.

        A failure, e.g. on a full disk, is printed and leaves earlier checkpoints unchanged; see `wait`.
        """
        self.wait()
        partial = self._partial(step)
        commit = self._committer(partial, self.folder / f"step-{step:08d}", meta)
        self.step = step
        if self.asynchronous:
            future = dcp.async_save(state, checkpoint_id=partial, process_group=self.group, async_stager=self.stager)
            assert isinstance(future, Future)
            self.pending = _then(future, commit).result
        else:
            self.pending = lambda: (dcp.save(state, checkpoint_id=partial), commit())
            self.wait()

    def wait(self) -> None:
        """Wait until the save in flight has ended on all processes; then `saved` is whether it succeeded. A
        collective."""
        if self.pending is None:
            return
        failure = _failure_of(self.pending)
        self.pending = None
        self.saved = sum_over_ranks(failure is not None)[0] == 0
        if not self.saved and self.world.main:
            shutil.rmtree(self._partial(self.step), ignore_errors=True)
            reason = failure or "another process could not write its part"
            told = f"the checkpoint of step {self.step} failed: {reason}{_room(self.folder)}"
            print(told, file=sys.stderr, flush=True)

    def load(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Fill the tensors of `state` in place from a checkpoint of any world size; a collective.

        Raises:
            ConfigError: with the reason if it cannot be loaded, as when it holds anything but tensors.
        """
        try:
            dcp.load(state, storage_reader=TensorReader(checkpoint), planner=TensorPlanner())
        except CheckpointException as error:
            raise ConfigError(f"{checkpoint} is not loaded: {_reasons(error)}") from error
        if checkpoint.parent.resolve() == self.folder.resolve():  # it was verified when it was chosen
            self.sound.add(checkpoint.name)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _committer(self, partial: Path, final: Path, meta: CheckpointMeta) -> Callable[[], None]:
        text = meta.to_json()  # now, because the run's progress changes while tensors are written

        def commit() -> None:
            if self.world.main:  # torch.distributed.checkpoint calls this after all processes have written
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
        """Remove checkpoints older than the newest `keep` verified ones, but never the one just saved.

        Other checkpoints do not count, because verifying them would mean reading them.
        """
        whole = whole_checkpoints(self.folder)
        counted = [checkpoint for checkpoint in whole if checkpoint.name in self.sound]
        for old in whole[: whole.index(counted[-self.keep])] if len(counted) >= self.keep else []:
            step = int(NAME.fullmatch(old.name)[1])  # type: ignore[index]
            if old != saved and (not self.keep_every or step % self.keep_every):
                remove(old)


def pinned_stager() -> DefaultStager:
    """Copies a state from the GPU into pinned memory, which is kept for the next save."""
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=True, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=True
        )
    )


def _then(future: Future, action: Callable[[], None]) -> Future:
    """A future that completes when `action` has run after `future`."""
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
    """The reason why a save failed on this process, in one line; None if it succeeded."""
    try:
        save()
    except OSError as error:
        return str(error)
    except CheckpointException as error:
        return _reasons(error)
    return None


def _reasons(error: CheckpointException) -> str:
    """The reasons of an error on all processes, in one line."""
    found = {str(failure).splitlines()[0] for failure, _ in error.failures.values()}
    return "; ".join(sorted({SHORT_WRITE if "inline_container" in reason else reason for reason in found}))


def _room(folder: Path) -> str:
    """How much of a disk is free, after what went wrong; nothing if its folder is gone."""
    try:
        return f"; {shutil.disk_usage(folder).free / 2**30:.1f} GiB are free in {folder}"
    except OSError:
        return ""


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, renaming it first so that it never looks complete."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
