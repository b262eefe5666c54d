"""Durable files: after a crash or power cut a file has its old or its new content."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_durably(path: Path, text: str) -> None:
    """Write a file durably: to a temporary file that is synced and renamed."""
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)  # remove a partial file, e.g. on a full disk
        raise
    sync_folder(path.parent)


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file, or if it is damaged, with a message."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        pass
    print(f"{path} is damaged and left aside", file=sys.stderr, flush=True)
    return None


def write_folder_durably(folder: Path, fill: Callable[[Path], object]) -> None:
    """Replace `folder` durably by what `fill(temporary folder)` writes (files only), unless the content is the same."""
    beside, former = (folder.with_name(f".{folder.name}.{state}") for state in ("unfinished", "former"))
    for leftover in (beside, former):
        shutil.rmtree(leftover, ignore_errors=True)
    beside.mkdir()
    fill(beside)
    if _contents(folder) == _contents(beside):
        return shutil.rmtree(beside)
    for file in beside.iterdir():
        sync_file(file)
    sync_folder(beside)
    if folder.exists():
        os.rename(folder, former)
    os.rename(beside, folder)
    sync_folder(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _contents(folder: Path) -> dict[str, bytes] | None:
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.is_dir() else None


def make_folder_durably(folder: Path) -> None:
    """Create a folder and its parents durably, unless it exists."""
    if not folder.is_dir():
        make_folder_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
