"""A lock on the run directory, held from before anything is read from it until the run has ended."""

import os
from pathlib import Path

from filelock import FileLock, Timeout

from lrtrain.config.check import is_taken
from lrtrain.config.schema import Config
from lrtrain.core.files import make_folder_durably
from lrtrain.distributed.collectives import run_on_rank0
from lrtrain.errors import ConfigError

FOLDERS = ("checkpoints", "tokenizer", "spectra", "plots", "profile", "collectives", "wandb")
FILES = ("lock", "run.json", "config.yaml", "metrics.jsonl", "summary.json")


class RunLock:
    """Creates the run directory and locks it; a context manager that all processes enter and leave.

    The lock is a flock on `<run.dir>/lock`, held by the main process and released when that process ends for any
    reason.

    Raises:
        ConfigError: on every process, if another run holds the lock, or the directory cannot be written.
    """

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.run.dir)
        self.lock = FileLock(self.folder / "lock")
        self._mine: tuple[int, int] | None = None

    def __enter__(self) -> "RunLock":
        run_on_rank0(self._take)
        return self

    def _take(self) -> None:
        try:
            make_folder_durably(self.folder)
            check_kinds(self.folder)
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ConfigError(
                f"run.dir={self.folder} is in use by a run that has not ended; choose another run.name"
            ) from error
        except OSError as error:
            raise ConfigError(f"run.dir={self.folder} cannot be written: {error.strerror}") from error
        if self.config.resume != "auto" and is_taken(self.folder):
            self.lock.release()
            raise ConfigError(f"run.dir={self.folder} was taken by another run just now; choose another run.name")
        self._mine = _inode(self.folder / "lock")
        print(f"run {self.config.run.name} in {self.folder}", flush=True)

    def lost(self) -> bool:
        """Whether the directory was removed, moved, or replaced since; rank 0 alone can tell."""
        return self._mine is not None and _inode(self.folder / "lock") != self._mine

    def __exit__(self, *_: object) -> None:
        if self._mine is None:
            return
        if not self.lost() and not is_taken(self.folder):  # the run failed before writing anything
            (self.folder / "lock").unlink()
            self.folder.rmdir()
        self.lock.release()
        self._mine = None


def check_kinds(folder: Path) -> None:
    """Check that no folder has the name of one of a run's files, and no file that of a folder.

    Raises:
        ConfigError: if one does, naming it.
    """
    for names, right, kind, belongs in (
        (FOLDERS, Path.is_dir, "a file", "folder"),
        (FILES, Path.is_file, "a folder", "file"),
    ):
        for path in (folder / name for name in names):
            if path.exists() and not right(path):
                raise ConfigError(f"{path} is {kind} where a run has a {belongs} of its own; move it away")


def _inode(path: Path) -> tuple[int, int] | None:
    """(device, inode) of a file; None if there is no file."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino
