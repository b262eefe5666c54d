"""The files below a folder."""

import os
from pathlib import Path


def files_below(folder: Path) -> tuple[list[Path], int]:
    """The files in `folder` and its subfolders, following links, and the number of hidden files and folders skipped.

    Each folder is visited once, so circular and duplicate links are safe.
    """
    files: list[Path] = []
    hidden = 0
    visited: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in visited:
            folders[:] = []
            continue
        visited.add(real)
        hidden += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return [file for file in files if file.is_file()], hidden
