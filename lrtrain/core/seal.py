"""Checksums stored in a folder, to detect later damage to its files."""

import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lrtrain.core.files import write_durably

SEAL = "seal.json"
BLOCK = 1 << 20  # bytes under one checksum
WHOLE = 1 << 28  # bytes; of a larger file that is unmodified since, only a sample of blocks is read
SAMPLE = 128  # blocks


def seal(folder: Path) -> None:
    """Write the checksums of all files in `folder` into it."""
    files = {str(file.relative_to(folder)): _entry(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    write_durably(folder / SEAL, json.dumps(files))


def damage(folder: Path) -> str | None:
    """A description of the damage to a folder since `seal`; None if it is intact.

    Every byte of small files is read, but only 128 random blocks of a large file whose size and time are unchanged.
    """
    try:
        sealed: dict[str, Any] = json.loads((folder / SEAL).read_text())
        wrong = [name for name, entry in sealed.items() if not _is_as_sealed(folder / name, entry)]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / SEAL} or what it lists is missing or damaged"
    return f"{folder / wrong[0]} does not have its checksum" if wrong else None


def _entry(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "crc32": list(_checksums(file))}


def _is_as_sealed(file: Path, entry: dict[str, Any]) -> bool:
    stat, sums = file.stat(), entry["crc32"]
    if stat.st_size != entry["size"]:
        return False
    if stat.st_size <= WHOLE or stat.st_mtime_ns != entry["mtime_ns"]:
        return list(_checksums(file)) == sums
    with file.open("rb") as opened:
        return all(_checksum_at(opened, i) == sums[i] for i in random.SystemRandom().sample(range(len(sums)), SAMPLE))


def _checksums(file: Path) -> Iterator[int]:
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            yield zlib.crc32(block)


def _checksum_at(opened: Any, block: int) -> int:
    opened.seek(block * BLOCK)
    return zlib.crc32(opened.read(BLOCK))
