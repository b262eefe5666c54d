"""Sources of text. `conf/data/*.yaml` names one of these classes in `source._target_`.

A source provides its documents in a fixed order, a fingerprint of their content, and a fast validation of its settings.
"""

import glob
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from datasets import StreamingDownloadManager
from datasets.data_files import resolve_pattern
from datasets.utils.file_utils import xopen

from lrtrain.core.cache import content_digests, fingerprint
from lrtrain.core.retry import retried
from lrtrain.data.faults import Faults, FileFaults, printable
from lrtrain.data.files import (
    DAMAGE,
    field_names,
    field_of,
    is_damage,
    is_supported,
    is_text,
    no_text,
    no_text_column,
    parquet_rows,
    read_documents,
    read_schema,
    reader_of,
)
from lrtrain.data.folders import files_below
from lrtrain.errors import ConfigError

log = logging.getLogger(__name__)

FORMATS = "give files, folders or globs of .txt, .md, .jsonl or .parquet"
SAMPLE_DOCUMENTS = 20_000  # of a stream, to train its tokenizer: about 40 MB of C4
BATCH = 64  # documents of a stream tokenized at a time
CHUNK = 1 << 20  # bytes of a stream read at a time
INSTALLED = {"site-packages", "dist-packages"}  # folders within the standard library's that do not belong to it


class TextSource(Protocol):
    """The interface of a source."""

    def check(self) -> None:
        """Raise ConfigError for invalid settings, before anything is built."""
        ...

    def fingerprint(self, cache_dir: Path) -> str:
        """A digest of the documents' content; digests of files are cached in `cache_dir`."""
        ...

    def documents(self, faults: Faults) -> Iterator[str]:
        """The nonempty documents in order; unreadable ones are added to `faults`."""
        ...


@dataclass(frozen=True)
class PythonStdlib:
    """The .py files of the running interpreter's standard library."""

    def check(self) -> None:
        if not self.files():
            raise ConfigError(f"data.name=pystdlib finds no .py file in {self.root()}; give your own with data=local")

    def fingerprint(self, cache_dir: Path) -> str:
        return fingerprint("pystdlib", content_digests(self.files(), cache_dir))

    def documents(self, faults: Faults) -> Iterator[str]:
        for path in self.files():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few files test the interpreter's own decoding
                continue
            if text and not text.isspace():
                yield text

    def root(self) -> Path:
        return Path(sysconfig.get_path("stdlib"))

    def files(self) -> list[Path]:
        """The readable files, sorted by path."""
        found: list[Path] = []
        for folder, folders, names in os.walk(self.root()):
            folders[:] = set(folders) - INSTALLED
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        return sorted(file for file in found if _is_readable(file))


@dataclass(frozen=True)
class LocalFiles:
    """Files, folders and globs. A text file is one document; a .jsonl or .parquet file has one per row."""

    path: str | list[str]
    text_field: str

    def check(self) -> None:
        files = self.files(tell=True)
        for file in files:
            if not _is_readable(file):
                raise ConfigError(f"data.path={self.path} matches {file}, which must be readable")
        for file in files:
            if (names := field_names(file)) is not None:
                if self.text_field not in names:
                    raise ConfigError(
                        f"data.text_field={self.text_field} is not a field of {file}; give one of {names}"
                    )
                if reader_of(file) is parquet_rows and (why := no_text_column(read_schema(file), self.text_field)):
                    raise ConfigError(f"data.text_field={self.text_field} does not suit {file}: {why}")
                return

    def fingerprint(self, cache_dir: Path) -> str:
        files = self.files()
        names = [file.name for file in files]  # suffixes decide how files are read
        return fingerprint("local", self.text_field, names, content_digests(files, cache_dir))

    def documents(self, faults: Faults) -> Iterator[str]:
        return read_documents(self.files(), self.text_field, faults)

    def files(self, tell: bool = False) -> list[Path]:
        """The files, sorted by path, each once, even if several names and links lead to it.

        Hidden files are read if they are named, not if their folder is; `tell` logs how many were skipped.

        Raises:
            ConfigError: if a pattern matches no file.
        """
        files = sorted({file.absolute() for pattern in _patterns(self.path) for file in self._matches(pattern, tell)})
        if not files:
            raise ConfigError(f"data.path={self.path} names no file; {FORMATS}")
        once = {os.path.realpath(file): file for file in reversed(files)}
        return sorted(once.values())

    def _matches(self, pattern: str, tell: bool) -> list[Path]:
        if not pattern:
            raise ConfigError(f"data.path={self.path} has an empty name; {FORMATS}")
        path = Path(pattern).expanduser()
        if path.is_dir():
            found, hidden = files_below(path)
            if hidden and tell:
                log.warning("data.path=%s: %d hidden files and folders are left out", pattern, hidden)
        elif path.is_file():
            found = [path]
        else:
            found = [Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name)]
        files = [file for file in found if is_supported(file)]
        if not files:
            raise ConfigError(f"data.path={pattern} matches no file; {FORMATS}")
        return files


@dataclass(frozen=True)
class JsonStream:
    """Files of JSON lines that are read during training, local or on the hub (`hf://datasets/…`).

    The files are distributed over `streams` streams; see lrtrain.data.streams for the order of the samples.
    """

    train: str | list[str]
    validation: str | list[str]
    text_field: str
    streams: int
    validation_sequences: int

    def check(self) -> None:
        if self.streams is None or self.streams < 1:
            raise ConfigError(f"data.streams={self.streams} must be a multiple of the number of processes")
        if self.validation_sequences < 0:
            key = "data.source.validation_sequences"
            raise ConfigError(f"{key}={self.validation_sequences} must be 0 or more")
        if _is_local(self.train):
            self.train_files()
        if _is_local(self.validation):
            self.validation_files()

    def fingerprint(self, cache_dir: Path) -> str:
        """A digest of names and, for local files, sizes: the content is too large to read before training."""
        files = [*self.train_files(), *self.validation_files()]
        sizes = [None if "://" in file else os.path.getsize(file) for file in files]
        names = [os.path.basename(file) for file in files]
        return fingerprint("stream", self.text_field, self.streams, names, sizes)

    def documents(self, faults: Faults) -> Iterator[str]:
        """The first documents of the first training file, to train a tokenizer."""
        return islice(self._read(self.train_files()[:1], faults), SAMPLE_DOCUMENTS)

    def validation_documents(self, faults: Faults) -> Iterator[str]:
        return self._read(self.validation_files(), faults)

    def train_files(self) -> list[str]:
        """The training files, sorted. Raises ConfigError if there are fewer files than streams."""
        files = _resolve("data.path", self.train)
        if len(files) < self.streams:
            raise ConfigError(
                f"data.streams={self.streams} must be at most {len(files)}, the number of files: set "
                f"data.streams={len(files)}, or a smaller multiple of the number of processes"
            )
        return files

    def validation_files(self) -> list[str]:
        return _resolve("data.source.validation", self.validation)

    def _read(self, files: list[str], faults: Faults) -> Iterator[str]:
        for file in files:
            for rows in json_batches(file, self.text_field, 0, faults):
                yield from (text for _, text in rows)


def nonempty(documents: Iterator[str], faults: Faults) -> Iterator[str]:
    """The documents. Raises ConfigError if there is none (white space does not count)."""
    found = False
    for text in documents:
        found = True
        yield text
    if not found:
        raise ConfigError(f"data.path has no text{f'; {faults}' if faults.count else ''}; give files with documents")


def json_batches(file: str, text_field: str, start: int, faults: Faults) -> Iterator[list[tuple[int, str]]]:
    """Batches of (row, text) of a file of JSON lines from row `start` on, without rows that have no text.

    Unreadable rows, the rest of a damaged file, and a missing file are added to `faults`. Raises ConfigError if the
    first row is an object without `text_field`.
    """
    batch: list[tuple[int, str]] = []
    row, of_file = start, FileFaults(faults, file, found=start > 0)
    try:
        for row, line in enumerate(retried(lambda had: _lines(file, start + had), printable(file)), start):
            text = field_of(line, text_field)
            if row == 0:
                _check_field(file, line, text_field)
            if not is_text(text) and line and not line.isspace():
                of_file.add(row + 1, no_text(text_field))
            elif text:
                of_file.document()
                batch.append((row, text))
            if len(batch) == BATCH:
                yield batch
                batch = []
    except (*DAMAGE, OSError) as error:
        if not (is_damage(error) or isinstance(error, FileNotFoundError)):
            raise
        of_file.add(row + 1, str(error))
    if batch:
        yield batch
    if not of_file.found:
        of_file.lost()


def _lines(file: str, start: int) -> Iterator[bytes]:
    """The lines of a local or remote file, compressed or not, from line `start` on; reconnects lost connections."""
    with xopen(StreamingDownloadManager().extract(file), "rb") as stream:
        rest, row = b"", 0
        while chunk := stream.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines[max(0, start - row) :]
            row += len(lines)
        if rest and row >= start:
            yield rest


def _check_field(file: str, line: bytes, text_field: str) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and text_field not in row:
        raise ConfigError(f"data.text_field={text_field} is not a field of {file}; give one of {list(row)}")


def _resolve(key: str, patterns: str | list[str]) -> list[str]:
    """The sorted files of local or hub `patterns`. Raises ConfigError naming `key`."""
    found: set[str] = set()
    for pattern in _patterns(patterns):
        try:
            found.update(resolve_pattern(os.path.expanduser(pattern), os.getcwd()))
        except Exception as error:  # an OSError, or any error of the hub client when offline
            raise ConfigError(
                f"{key}={pattern} cannot be listed ({error}); give local or hf:// files of JSON lines"
            ) from error
    return sorted(found)


def _is_local(patterns: str | list[str]) -> bool:
    """Whether the files are local; files on a hub are listed only once, when they are needed."""
    return not any("://" in pattern for pattern in _patterns(patterns))


def _patterns(path: Any) -> list[str]:
    return [str(pattern) for pattern in (path if isinstance(path, list) else [path])]


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK)
