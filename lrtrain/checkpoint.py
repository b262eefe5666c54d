"""Checkpoints that are whole or not there.

`checkpoints/step-00001000/` holds the shards of torch.distributed.checkpoint, `meta.json`, and `checksums.json` with
the size and CRC-32 of each, the marker of a whole checkpoint. It is written as `.step-00001000.partial` and renamed
when every process is done; a removal renames it away first. So whatever bears the final name and has the marker was
complete, wherever a process was killed; the checksums tell if it still is.
"""

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lrtrain.distributed import World, total
from lrtrain.errors import ConfigError
from lrtrain.tensor_reader import TensorPlanner, TensorReader

META = "meta.json"
MARKER = "checksums.json"
NAME = re.compile(r"step-(\d{8})")


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a `checkpoints` folder, by ascending step."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MARKER).is_file())


def newest_sound(folder: Path) -> Path | None:
    """The newest complete checkpoint in a `checkpoints` folder that is as it was written; None if there is none.

    Each one that is not is named on stderr.

    Raises:
        ConfigError: if all that there are were changed since.
    """
    found = whole_checkpoints(folder)
    for checkpoint in reversed(found):
        damage = damage_of(checkpoint)
        if damage is None:
            return checkpoint
        print(f"{checkpoint} is damaged and left aside: {damage}", file=sys.stderr, flush=True)
    if found:
        raise ConfigError(f"all checkpoints in {folder} are damaged; choose another run.name to start anew")
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest sound one of the run that it is the folder of.

    Raises:
        ConfigError: if there is none, or the one named is damaged.
    """
    if (path / MARKER).is_file():
        if damage := damage_of(path):
            raise ConfigError(f"resume={path} is damaged: {damage}")
        return path
    found = newest_sound(path / "checkpoints")
    if found is None:
        raise ConfigError(f"resume={path} holds no complete checkpoint; give a run directory or one of its checkpoints")
    return found


def damage_of(checkpoint: Path) -> str | None:
    """What differs from the checkpoint that was written, in a few words; None if nothing does. Reads all of it."""
    try:
        expected = json.loads((checkpoint / MARKER).read_text())
        files = {name: checkpoint / name for name in expected}
        for name, file in files.items():
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected[name]["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected[name]['bytes']}"
        found = checksums([*files.values()])
        return next((f"{name} has another checksum" for name in files if found[name] != expected[name]), None)
    except (ValueError, AttributeError, KeyError, TypeError):
        return f"{MARKER} is not readable"


def checksums(files: list[Path]) -> dict[str, dict[str, int]]:
    """File name → its bytes and their CRC-32; several files at a time."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(checksum, files)
        return {file.name: {"bytes": file.stat().st_size, "crc32": crc} for file, crc in zip(files, found, strict=True)}


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return crc


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, tokens, data position, configuration, versions."""
    return json.loads((checkpoint / META).read_text())


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
        self.pending: Future | None = None
        self.step = 0
        self.saved = True
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):
                shutil.rmtree(leftover)

    def save(self, state: dict[str, Any], step: int, meta: dict[str, Any]) -> None:
        """Begin a checkpoint of `state` (copied before this returns); a collective. Waits for the one before.

        One that fails, as on a full disk, is told of and leaves those before it as they are; see `wait`.
        """
        self.wait()
        partial = self._partial(step)
        commit = self._committer(partial, self.folder / f"step-{step:08d}", {**meta, "step": step})
        self.step = step
        if self.asynchronous:
            future = dcp.async_save(state, checkpoint_id=partial, process_group=self.group)
            assert isinstance(future, Future)
            self.pending = _then(future, commit)
        else:
            self.pending = _result_of(lambda: (dcp.save(state, checkpoint_id=partial), commit()))
            self.wait()

    def wait(self) -> bool:
        """Until the save in flight has ended on all processes; whether the last one is on the disk. A collective."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            failure = _failure_of(pending)
            failed = total(failure is not None)[0] > 0
            self.saved = not failed
            if failed and self.world.main:
                shutil.rmtree(self._partial(self.step), ignore_errors=True)
                reason = failure or "another process could not write its part"
                print(f"the checkpoint of step {self.step} failed: {reason}", file=sys.stderr, flush=True)
        return self.saved

    def load(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Fill the tensors of `state` in place from a checkpoint of any world size; a collective.

        Raises:
            ConfigError: if it holds anything but tensors.
        """
        reader = TensorReader(checkpoint)
        try:
            reader.read_metadata()  # of a refusal dcp.load itself says only that there is no metadata
            dcp.load(state, storage_reader=reader, planner=TensorPlanner())
        except UnpicklingError as error:
            raise ConfigError(f"{checkpoint} is not loaded: {error}") from error
        except CheckpointException as error:
            causes = {failure for failure, _ in error.failures.values() if isinstance(failure, UnpicklingError)}
            if not causes:
                raise
            raise ConfigError(f"{checkpoint} is not loaded: {causes.pop()}") from error

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.partial"

    def _committer(self, partial: Path, final: Path, meta: dict[str, Any]) -> Callable[[], None]:
        def commit() -> None:
            if self.world.main:  # torch.distributed.checkpoint returns here only when all processes have written
                write_durably(partial / META, json.dumps(meta, indent=1))
                write_durably(partial / MARKER, json.dumps(checksums(sorted(partial.iterdir())), indent=1))
                if final.exists():
                    remove(final)
                partial.rename(final)
                sync_folder(self.folder)
                self._retire()

        return commit

    def _retire(self) -> None:
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            step = int(NAME.fullmatch(old.name)[1])  # type: ignore[index]
            if not self.keep_every or step % self.keep_every:
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


def _result_of(action: Callable[[], Any]) -> Future:
    """A future that is done: with what `action` returned or raised."""
    future: Future = Future()
    try:
        future.set_result(action())
    except (OSError, CheckpointException) as error:
        future.set_exception(error)
    return future


def _failure_of(save: Future) -> str | None:
    """Why a save failed on this process, in one line; None if it did not. What is no failure to write is raised."""
    try:
        save.result()
    except OSError as error:
        return str(error)
    except CheckpointException as error:
        causes = {str(failure).splitlines()[0] for failure, _ in error.failures.values()}
        return "; ".join(sorted(causes))
    return None


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; from the first moment it is not taken for whole."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def write_durably(path: Path, text: str) -> None:
    """Write a file so that it is on the disk when this returns."""
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
