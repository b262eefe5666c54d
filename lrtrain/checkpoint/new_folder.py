"""A folder that gets its name when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lrtrain.core.files import make_folder_durably, sync_file, sync_folder
from lrtrain.errors import ConfigError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill beside `out`; it is renamed to `out`, with all its files on the disk, when the block ends.

    What a killed process left of the same folder is removed. A block that fails leaves nothing.

    Raises:
        ConfigError: if `out` exists, cannot be written, or is being written by another process.
    """
    check_new(out)
    partial = out.with_name(f".{out.name}.partial")
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        make_folder_durably(out.parent)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"--out {out} is being written by another process; choose another folder") from error
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        check_new(out)  # another process may have finished it in between
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            sync_file(file)
        sync_folder(partial)
        partial.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def check_new(out: Path) -> None:
    """Raises ConfigError if `out` exists, even as a broken link."""
    if os.path.lexists(out):
        what = "exists" if out.exists() else "is a link to nothing"
        raise ConfigError(f"--out {out} {what}; choose another folder")
