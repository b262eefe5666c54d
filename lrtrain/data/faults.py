"""Parts of a corpus that cannot be read: counted, named, and skipped or refused."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from lrtrain.errors import ConfigError

log = logging.getLogger(__name__)

NAMED = 10  # number of faults named in the log; further ones are only counted


@dataclass
class Faults:
    """The faults of a corpus.

    Args:
        refuse: whether the first fault ends the run (`data.on_error=refuse`).
        rows: number of unreadable documents, and of files whose rest is unreadable.
        files: number of files without any readable document.
        first: the first fault, by file and row.
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
        """Record that row `row` (from 1), or all of `file` from there on, could not be read.

        Raises:
            ConfigError: if faults are refused, naming it.
        """
        self._note(f"{file}:{row}: {reason}", self.rows)
        self.rows += 1

    def add_file(self, file: object, rows: int, reason: str) -> None:
        """Record that `file` has no readable document; its `rows` faults added before now count as one file.

        Raises:
            ConfigError: if faults are refused, naming it.
        """
        self.rows -= rows
        self.first = self.first if self.count else ""  # name the file, not its first row
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
    """The faults of one file, reported as one fault if no document can be read."""

    def __init__(self, faults: Faults, file: object, found: bool = False):
        self._faults = faults
        self._file = file
        self.found = found
        self._held: tuple[int, str] | None = None  # the first fault, until it is known whether the file has documents
        self._first = "it holds no text"
        self._rows = 0

    def document(self) -> None:
        """Record that a document was read."""
        self.found = True
        self._flush()

    def add(self, row: int, reason: str) -> None:
        """Record that row `row`, or the rest of the file from there on, could not be read."""
        if self.found or self._rows or self._held:
            self._flush()
            self._rows += 1
            self._faults.add(self._file, row, reason)
        else:
            self._held, self._first = (row, reason), reason

    def lost(self, reason: str | None = None) -> None:
        """Record that the file has ended without a document; `reason` defaults to its first fault."""
        self._faults.add_file(self._file, self._rows, reason or self._first)

    def _flush(self) -> None:
        if self._held:
            self._faults.add(self._file, *self._held)
            self._held, self._rows = None, self._rows + 1


def recorded_faults(found: dict[str, Any], refuse: bool) -> Faults:
    """The faults that were recorded when the corpus was packed.

    Raises:
        ConfigError: if there are any and they are refused, naming the first.
    """
    faults = Faults(**found)
    faults.refuse = refuse
    if faults.count and refuse:
        raise ConfigError(_refusal(faults.first))
    return faults


def printable(name: object) -> str:
    """A file's name in printable form: bytes that are not UTF-8 are escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _refusal(where: str) -> str:
    return f"data.on_error=refuse: {where}; repair or remove it, or skip such documents with data.on_error=skip"
