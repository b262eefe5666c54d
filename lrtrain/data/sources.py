"""Where text comes from. `conf/data/*.yaml` names one of these classes in `source._target_`.

A source gives its documents in an order that does not change, a fingerprint of what they are, and a cheap
check of what the user asked for.
"""

import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from datasets import load_dataset
from datasets.data_files import resolve_pattern

from lrtrain.data.cache import content_digests, fingerprint
from lrtrain.data.files import field_names, is_supported, read_documents
from lrtrain.errors import ConfigError

FORMATS = "give files, folders or globs of .txt, .md, .jsonl or .parquet"
SAMPLE_DOCUMENTS = 20_000  # of a stream, for its tokenizer: some 40 MB of C4


class TextSource(Protocol):
    """What `lrtrain.data.prepare` asks of a source."""

    def check(self) -> None:
        """Raise ConfigError for what cannot work, before anything is built."""
        ...

    def fingerprint(self, cache_dir: Path) -> str:
        """A digest of the documents' content; `cache_dir` remembers the digests of files."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents in order, none of them empty."""
        ...


@dataclass(frozen=True)
class PythonStdlib:
    """The .py files of the running interpreter's standard library."""

    def check(self) -> None:
        if not self.files():
            raise ConfigError(f"data.name=pystdlib finds no .py file in {self.root()}; give your own with data=local")

    def fingerprint(self, cache_dir: Path) -> str:
        return fingerprint("pystdlib", content_digests(self.files(), cache_dir))

    def documents(self) -> Iterator[str]:
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
        installed = {"site-packages", "dist-packages"}
        root = self.root()
        names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        files = [root / name for name in names if not installed & set(name.parts)]
        return [file for file in files if _is_readable(file)]


@dataclass(frozen=True)
class LocalFiles:
    """Files, folders and globs. A text file is a document; so is a row of a .jsonl or .parquet file."""

    path: str | list[str]
    text_field: str

    def check(self) -> None:
        for file in self.files():
            if not _is_readable(file):
                raise ConfigError(f"data.path={self.path} matches {file}, which must be readable")
        for file in self.files():
            if (names := field_names(file)) is not None:
                if self.text_field not in names:
                    raise ConfigError(
                        f"data.text_field={self.text_field} is not a field of {file}; give one of {names}"
                    )
                return

    def fingerprint(self, cache_dir: Path) -> str:
        files = self.files()
        names = [file.name for file in files]  # their suffixes decide how the bytes are read
        return fingerprint("local", self.text_field, names, content_digests(files, cache_dir))

    def documents(self) -> Iterator[str]:
        return read_documents(self.files(), self.text_field)

    def files(self) -> list[Path]:
        """The files, sorted by path, each once. Raises ConfigError when a pattern matches none."""
        files = {file.absolute() for pattern in _patterns(self.path) for file in self._matches(pattern)}
        if not files:
            raise ConfigError(f"data.path={self.path} names no file; {FORMATS}")
        return sorted(files)

    def _matches(self, pattern: str) -> list[Path]:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file()]
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
    """Files of JSON lines that are read while training, local ones or on the hub (`hf://datasets/…`).

    The files are dealt to `streams` canonical streams; lrtrain.data.streams has the order of the samples.
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
        """Of names and, for local files, sizes: the content is too large to read before training."""
        files = [*self.train_files(), *self.validation_files()]
        sizes = [None if "://" in file else os.path.getsize(file) for file in files]
        names = [os.path.basename(file) for file in files]
        return fingerprint("stream", self.text_field, self.streams, names, sizes)

    def documents(self) -> Iterator[str]:
        """The beginning of the first training file: what a tokenizer is trained on."""
        return islice(self._read(self.train_files()[:1]), SAMPLE_DOCUMENTS)

    def validation_documents(self) -> Iterator[str]:
        return self._read(self.validation_files())

    def train_files(self) -> list[str]:
        """Sorted. Raises ConfigError when there are fewer files than streams."""
        files = _resolve("data.path", self.train)
        if len(files) < self.streams:
            raise ConfigError(f"data.streams={self.streams} must be at most {len(files)}, the number of files")
        return files

    def validation_files(self) -> list[str]:
        return _resolve("data.source.validation", self.validation)

    def _read(self, files: list[str]) -> Iterator[str]:
        for file in files:
            for _, texts in json_batches(file, self.text_field, start=0):
                yield from (text for text in texts if text)


def json_batches(file: str, text_field: str, start: int) -> Iterator[tuple[int, list[str | None]]]:
    """(row of the first text, texts) of a file of JSON lines from row `start` on, some at a time.

    Raises ConfigError when the rows have no `text_field`.
    """
    rows = load_dataset("json", data_files=[file], split="train", streaming=True).skip(start)
    for batch in rows.iter(batch_size=64):
        if text_field not in batch:
            raise ConfigError(f"data.text_field={text_field} is not a field of {file}; give one of {list(batch)}")
        yield start, batch[text_field]
        start += len(batch[text_field])


def _resolve(key: str, patterns: str | list[str]) -> list[str]:
    """The sorted files of local or hub `patterns`. Raises ConfigError naming `key`."""
    found: set[str] = set()
    for pattern in _patterns(patterns):
        try:
            found.update(resolve_pattern(os.path.expanduser(pattern), os.getcwd()))
        except Exception as error:  # an OSError, or whatever the hub client of the day raises offline
            raise ConfigError(
                f"{key}={pattern} cannot be listed ({error}); give local or hf:// files of JSON lines"
            ) from error
    return sorted(found)


def _is_local(patterns: str | list[str]) -> bool:
    """Whether listing the files is cheap: those on a hub are listed once, when they are needed."""
    return not any("://" in pattern for pattern in _patterns(patterns))


def _patterns(path: Any) -> list[str]:
    return [str(pattern) for pattern in (path if isinstance(path, list) else [path])]


def _is_readable(path: Path) -> bool:
    return os.access(path, os.R_OK)
