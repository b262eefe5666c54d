"""Checkpoints that are whole or not there.

`checkpoints/step-00001000/` holds the shards of torch.distributed.checkpoint and `meta.json`, the marker of a whole
checkpoint. It is written as `.step-00001000.partial` and renamed when every process is done; a removal renames it
away first. So whatever bears the final name and has the marker is complete, wherever a process was killed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from lrtrain.distributed import World
from lrtrain.errors import ConfigError

MARKER = "meta.json"
NAME = re.compile(r"step-(\d{8})")


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a `checkpoints` folder, by ascending step."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / MARKER).is_file())


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run that it is the folder of.

    Raises:
        ConfigError: if there is no complete checkpoint.
    """
    if (path / MARKER).is_file():
        return path
    found = whole_checkpoints(path / "checkpoints")
    if not found:
        raise ConfigError(f"resume={path} holds no complete checkpoint; give a run directory or one of its checkpoints")
    return found[-1]


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, tokens, data position, configuration, versions."""
    return json.loads((checkpoint / MARKER).read_text())


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
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*"):
                shutil.rmtree(leftover)

    def save(self, state: dict[str, Any], step: int, meta: dict[str, Any]) -> None:
        """Begin a checkpoint of `state` (copied before this returns); a collective. Waits for the one before."""
        self.wait()
        partial = self.folder / f".step-{step:08d}.partial"
        commit = self._committer(partial, self.folder / f"step-{step:08d}", {**meta, "step": step})
        if self.asynchronous:
            future = dcp.async_save(state, checkpoint_id=partial, process_group=self.group)
            assert isinstance(future, Future)
            self.pending = _then(future, commit)
        else:
            dcp.save(state, checkpoint_id=partial)
            commit()

    def wait(self) -> None:
        """Until the save in flight is complete on this process; raises what went wrong in it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            pending.result()

    def load(self, state: dict[str, Any], checkpoint: Path) -> None:
        """Fill the tensors of `state` in place from a checkpoint of any world size; a collective."""
        dcp.load(state, checkpoint_id=checkpoint)

    def _committer(self, partial: Path, final: Path, meta: dict[str, Any]) -> Callable[[], None]:
        def commit() -> None:
            if self.world.main:  # torch.distributed.checkpoint returns here only when all processes have written
                write_durably(partial / MARKER, json.dumps(meta, indent=1))
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
