"""Small JSON files of things found out before, with a checksum: what is damaged is found out again."""

import json
import logging
import zlib
from contextlib import suppress
from pathlib import Path

from lrtrain.core.files import write_durably

log = logging.getLogger(__name__)


def read_memo(path: Path) -> dict[str, str]:
    """What is remembered in `path`; nothing if it is not there, or damaged, which is said."""
    try:
        stored = json.loads(path.read_text())
        if stored["crc32"] == _checksum(stored["known"]):
            return stored["known"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is damaged, or an older version's; it is begun anew", path)
    return {}


def write_memo(path: Path, known: dict[str, str]) -> None:
    """Remember `known`. Where the file cannot be written (another user's in a shared folder) it is found out again."""
    with suppress(PermissionError):
        write_durably(path, json.dumps({"crc32": _checksum(known), "known": known}, indent=1))
        share(path)


def share(path: Path) -> None:
    """Give a file or folder of ours the access that its folder gives, so that all who share that can read and write."""
    mode = path.parent.stat().st_mode
    with suppress(PermissionError):
        path.chmod(mode & (0o2777 if path.is_dir() else 0o666))


def _checksum(known: dict[str, str]) -> int:
    return zlib.crc32(json.dumps(known, sort_keys=True).encode())
