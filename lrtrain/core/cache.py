"""Things computed once: folders that the first process builds, and digests of files that did not change."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from filelock import FileLock


def cache_folder() -> Path:
    """Where lrtrain keeps what it computes once: $LRTRAIN_CACHE, or ~/.cache/lrtrain (as data.cache_dir does)."""
    return Path(os.environ.get("LRTRAIN_CACHE") or Path.home() / ".cache" / "lrtrain")


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, filled by `build(temporary folder)` unless it is there already.

    Every process may call this at once: the first builds, the others wait for its lock. The folder appears
    by a rename when it is complete; what an interrupted build left is removed by the next one.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.building")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            build(unfinished)
            unfinished.rename(folder)
    return folder


def fingerprint(*parts: object) -> str:
    """16 hex digits of JSON-able `parts`, the same in every process and version of Python."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def content_digests(files: Sequence[Path], cache_dir: Path) -> list[str]:
    """Digest of each file's bytes; a file whose path, size and mtime are known is not read again."""
    memo = cache_dir / "file-digests.json"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{memo}.lock"):  # so that the first process reads a large corpus and the others do not
        known = json.loads(memo.read_text()) if memo.exists() else {}
        fresh = dict(_digest_entries(files, known))
        if any(known.get(key) != digest for key, digest in fresh.items()):
            replace_text(memo, json.dumps(known | fresh))
    return list(fresh.values())


def _digest_entries(files: Iterable[Path], known: dict[str, str]) -> Iterable[tuple[str, str]]:
    for path in files:
        stat = path.stat()
        key = f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
        yield key, known.get(key) or _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a crash, sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
