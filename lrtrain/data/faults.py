"""What could not be read of a corpus: counted, named, and left out or refused."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from lrtrain.errors import ConfigError

log = logging.getLogger(__name__)

NAMED = 10  # in the log; the others are only counted


@dataclass
class Faults:
    """What a corpus was read without.

    Args:
        refuse: whether the first one ends the run (`data.on_error=refuse`).
        rows: documents, and rests of files that gave others.
        files: whole files, none of whose documents could be read.
        first: the first, named by file and row.
    """

    refuse: bool
    rows: int = 0
    files: int = 0
    first: str = ""

    @property
    def count(self) -> int:
        """Rows and files."""
        return self.rows + self.files

    def add(self, file: object, row: int, reason: str) -> None:
        """Note that row `row`, counted from 1, could not be read, or all of `file` from there on.

        Raises:
            ConfigError: naming it, if these are refused.
        """
        self._note(f"{file}:{row}: {reason}", self.rows)
        self.rows += 1

    def add_file(self, file: object, rows: int, reason: str) -> None:
        """Note that `file` gave no document at all; `rows` of it were added before and count as this one file.

        Raises:
            ConfigError: naming it, if these are refused.
        """
        self.rows -= rows
        self.first = self.first if self.count else ""  # the file, and not the first of its rows
        self._note(f"{file}, the whole file: {reason}", self.files)
        self.files += 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [(self.rows, "unreadable document"), (self.files, "whole file")]
        told = " and ".join(f"{count} {what}{'s' * (count > 1)}" for count, what in parts if count)
        return f"{told} {'is' if self.count == 1 else 'are'} left out, the first: {self.first}"

    def _note(self, where: str, before: int) -> None:
        where = printable(" ".join(where.split()))
        if self.refuse:
            raise ConfigError(_refusal(where))
        self.first = self.first or where
        if before < NAMED:
            log.warning("left out: %s%s", where, "; more are only counted" if before + 1 == NAMED else "")


class FileFaults:
    """What cannot be read of one file, told as one thing where nothing can."""

    def __init__(self, faults: Faults, file: object, found: bool = False):
        self._faults = faults
        self._file = file
        self.found = found
        self._held: tuple[int, str] | None = None  # the first, until it is known whether it is the only one
        self._first = "it holds no text"
        self._rows = 0

    def document(self) -> None:
        """Note that one was read."""
        self.found = True
        self._flush()

    def add(self, row: int, reason: str) -> None:
        """Note that row `row`, or the rest of the file from there on, could not be read."""
        if self.found or self._rows or self._held:
            self._flush()
            self._rows += 1
            self._faults.add(self._file, row, reason)
        else:
            self._held, self._first = (row, reason), reason

    def lost(self, reason: str | None = None) -> None:
        """Note that the file is over and gave nothing; why, if its first row does not say it best."""
        self._faults.add_file(self._file, self._rows, reason or self._first)

    def _flush(self) -> None:
        if self._held:
            self._faults.add(self._file, *self._held)
            self._held, self._rows = None, self._rows + 1


def recorded_faults(found: dict[str, Any], refuse: bool) -> Faults:
    """The faults that were met when the corpus was read before.

    Raises:
        ConfigError: naming the first, if there are any and they are refused.
    """
    faults = Faults(**found)
    faults.refuse = refuse
    if faults.count and refuse:
        raise ConfigError(_refusal(faults.first))
    return faults


def printable(name: object) -> str:
    """A file's name as any stream takes it: one that is no UTF-8 with its bytes spelled out."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _refusal(where: str) -> str:
    return f"data.on_error=refuse: {where}; mend or remove it, or leave such documents out with data.on_error=skip"
