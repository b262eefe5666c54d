"""The cache on disk: folders built once by the first process, and digests of unchanged files."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock

from lrtrain.core.files import sync_file, sync_folder
from lrtrain.core.memo import read_memo, share, write_memo
from lrtrain.core.retry import retried
from lrtrain.core.seal import damage, seal
from lrtrain.errors import ConfigError, RunFailed

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache folder: $LRTRAIN_CACHE, or ~/.cache/lrtrain.

    If the home directory is not writable, it is a temporary folder of this user, which is logged once.

    Raises:
        ConfigError: if $LRTRAIN_CACHE is not writable.
    """
    return _cache_folder(os.environ.get("LRTRAIN_CACHE"), os.path.expanduser("~"))


def why_not_writable(folder: Path) -> str | None:
    """The reason why `folder` (created if missing) is not writable; None if it is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"cannot be made ({error.strerror})"
    return None if os.access(folder, os.W_OK) else "is not writable"


def make_shared(folder: Path) -> None:
    """Create a folder inside the cache, with the cache's permissions."""
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        share(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, shared by all users who can write to its folder.

    If another user's lock cannot be opened (a sticky folder, an older version's), this user takes a separate lock:
    results are renamed into place, so two users at once only duplicate work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.parent.stat().st_mode & 0o666
    lock = FileLock(f"{path}.lock", mode=mode)
    try:
        lock.acquire()
    except PermissionError:
        lock = FileLock(f"{path}.{os.getuid()}.lock", mode=mode)
        lock.acquire()
    try:
        share(Path(lock.lock_file))  # the umask has restricted the mode
        yield
    finally:
        lock.release()


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build(temporary folder)` unless it exists and is intact.

    Safe for concurrent processes: the first builds, the others wait for its lock. The folder is renamed into place when
    it is complete and synced; the next build removes what an interrupted one left. A damaged folder is rebuilt, with a
    message.
    """
    if folder.exists() and damage(folder) is None:
        return folder
    with locked(folder):
        if folder.exists() and (fault := damage(folder)):
            log.warning("%s; it is rebuilt", fault)
            _remove(folder)
        if not folder.exists():
            _build(folder, build)
    return folder


def fingerprint(*parts: object) -> str:
    """A hash (16 hex digits) of JSON-serializable `parts`, the same in every process and version of Python."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def content_digests(files: Sequence[Path], cache_dir: Path) -> list[str]:
    """The digest of each file's bytes, cached by path, size and mtime."""
    memo = cache_dir / "file-digests.json"
    keys = [_key(file) for file in files]
    known = read_memo(memo)
    if not known.keys() >= set(keys):
        with locked(memo):  # so that only the first process reads a large corpus
            known = read_memo(memo)
            known |= {key: _digest(file) for key, file in zip(keys, files, strict=True) if key not in known}
            write_memo(memo, known)
    return [known[key] for key in keys]


@cache
def _cache_folder(named: str | None, home: str) -> Path:
    folder = Path(named).expanduser() if named else Path(home, ".cache", "lrtrain")
    if (reason := why_not_writable(folder) if named or home != "~" else "has no home") is None:
        return folder
    if named:
        raise ConfigError(f"LRTRAIN_CACHE={folder} {reason}; give a folder that can be written to")
    instead = Path(tempfile.gettempdir(), f"lrtrain-{os.getuid()}")
    instead.mkdir(mode=0o700, exist_ok=True)
    if instead.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} {reason}, and {instead} is another user's: name a folder by LRTRAIN_CACHE")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.warning("%s %s: the cache is %s; LRTRAIN_CACHE names another", folder, reason, instead)
    return instead


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    for leftover in folder.parent.glob(f"{folder.name}.building*"):
        shutil.rmtree(leftover, ignore_errors=True)  # another user's cannot be removed
    unfinished = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    build(unfinished)
    seal(unfinished)
    share(unfinished)
    for file in unfinished.rglob("*"):
        share(file)
        (sync_folder if file.is_dir() else sync_file)(file)
    sync_folder(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:
        if damage(folder) is not None:  # otherwise a user with another lock has built it
            raise
        shutil.rmtree(unfinished)
    sync_folder(folder.parent)


def _remove(folder: Path) -> None:
    """Remove a damaged folder, renaming it first, since others may look for it."""
    away = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    try:
        folder.rename(away)
    except OSError as error:
        raise RunFailed(f"{folder} is damaged and cannot be replaced ({error.strerror}); remove it") from error
    shutil.rmtree(away, ignore_errors=True)


def _key(file: Path) -> str:
    stat = file.stat()
    return f"{file.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"


def _digest(file: Path) -> str:
    def read(_: int) -> Iterator[str]:
        with file.open("rb") as opened:
            yield hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    return next(retried(read, file))
