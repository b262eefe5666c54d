"""Small JSON caches with a checksum; damaged ones are ignored."""

import json
import logging
import zlib
from contextlib import suppress
from pathlib import Path

from lrtrain.core.files import write_durably

log = logging.getLogger(__name__)


def read_memo(path: Path) -> dict[str, str]:
    """The content of a memo; empty if it does not exist, or if it is damaged, with a message."""
    try:
        stored = json.loads(path.read_text())
        if stored["crc32"] == _checksum(stored["known"]):
            return stored["known"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged, or an older version's; it is ignored", path)
    return {}


def write_memo(path: Path, known: dict[str, str]) -> None:
    """Write a memo, if possible (in a shared folder the file may be another user's)."""
    with suppress(PermissionError):
        write_durably(path, json.dumps({"crc32": _checksum(known), "known": known}, indent=1))
        share(path)


def share(path: Path) -> None:
    """Give a file or folder the permissions of its parent folder, so that all users who share it can read and write."""
    mode = path.parent.stat().st_mode
    with suppress(PermissionError):
        path.chmod(mode & (0o2777 if path.is_dir() else 0o666))


def _checksum(known: dict[str, str]) -> int:
    return zlib.crc32(json.dumps(known, sort_keys=True).encode())
