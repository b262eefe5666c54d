"""Documents of one file, by its format and compression."""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrtrain.core.retry import retried
from lrtrain.data.faults import Faults, FileFaults, printable
from lrtrain.errors import RunFailed

Reader = Callable[[Path, str], Iterator[tuple[int, Any]]]  # (file, text field) → (line, text or not a text)

DAMAGE = (EOFError, ValueError, KeyError, zlib.error, lzma.LZMAError, pa.ArrowException)  # see also `is_damage`


def read_documents(files: Iterable[Path], text_field: str, faults: Faults) -> Iterator[str]:
    """The texts of `files` in order, without empty ones.

    Unreadable rows, rests of files, and files without a document are added to `faults`.

    Raises:
        RunFailed: if the disk cannot read a file, naming it.
    """
    for path in files:
        of_file = FileFaults(faults, path)
        for row, text, fault in _checked(path, text_field):
            if fault:
                of_file.add(row, fault)
            elif text and not text.isspace():
                of_file.document()
                yield text
        if not of_file.found:
            of_file.lost("it is an array; give one JSON object a line" if _is_array(path) else None)


def is_damage(error: Exception) -> bool:
    """Whether an error means damaged content; an error of the system has an errno."""
    return error.errno is None if isinstance(error, OSError) else isinstance(error, DAMAGE)


def reader_of(path: Path) -> Reader:
    """The reader for the suffix of `path`. Raises KeyError for an unsupported one."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] == [".parquet"]:
        return parquet_rows
    if suffixes and suffixes[-1] in OPENERS:
        suffixes.pop()
    return READERS["".join(suffixes[-1:])]


def is_supported(path: Path) -> bool:
    """Whether `reader_of(path)` finds a reader."""
    try:
        return bool(reader_of(path))
    except KeyError:
        return False


def whole_text(path: Path, text_field: str) -> Iterator[tuple[int, Any]]:
    """The file as one document, with unchanged line ends."""
    with open_binary(path) as file:
        yield 1, file.read().decode("utf-8-sig")


def json_lines(path: Path, text_field: str) -> Iterator[tuple[int, Any]]:
    """`text_field` of each line; None for a line that is not a JSON object with this field."""
    with open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield number, field_of(line, text_field)


def parquet_rows(path: Path, text_field: str) -> Iterator[tuple[int, Any]]:
    """`text_field` of each row, counted from 1."""
    number = 0
    with path.open("rb") as opened, pq.ParquetFile(opened) as file:  # pyarrow cannot open names that are not UTF-8
        if reason := no_text_column(file.schema_arrow, text_field):
            raise ValueError(reason)
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(text_field).to_pylist():
                number += 1
                yield number, text


def no_text_column(schema: pa.Schema, name: str) -> str | None:
    """The reason why a column holds no texts; None if it does."""
    if name not in schema.names:
        return f"it has no column {name!r}"
    kind = schema.field(name).type
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = pa.types.is_string(values) or pa.types.is_large_string(values) or pa.types.is_string_view(values)
    return None if texts or pa.types.is_null(values) else f"its column {name!r} is of type {kind}, not of texts"


def field_names(path: Path) -> list[str] | None:
    """The fields of a file, from its schema or first line; None if they cannot be determined."""
    reader = reader_of(path)
    try:
        if reader is parquet_rows:
            return read_schema(path).names
        if reader is json_lines:
            with open_binary(path) as file:
                return list(json.loads(file.readline()).keys())
    except (*DAMAGE, OSError, RecursionError, AttributeError):  # reading the corpus will report the error
        return None
    return None


def read_schema(path: Path) -> pa.Schema:
    """The columns of a parquet file."""
    with path.open("rb") as opened:
        return pq.read_schema(opened)


def open_binary(path: Path) -> IO[bytes]:
    """The decompressed bytes of `path`."""
    return OPENERS.get(path.suffix.lower(), open)(path, "rb")


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(path.open("rb"), compression="zstd"))  # pyright: ignore


READERS: dict[str, Reader] = {
    ".txt": whole_text,
    ".md": whole_text,
    ".jsonl": json_lines,
    ".json": json_lines,
}
OPENERS: dict[str, Callable[[Path, str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def field_of(line: bytes | str, text_field: str) -> Any:
    """A field of a JSON object; None if the line is not a JSON object with this field."""
    try:
        return json.loads(line)[text_field]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_array(path: Path) -> bool:
    """Whether a file that should have one JSON object per line starts with an array."""
    if reader_of(path) is not json_lines:
        return False
    try:
        with open_binary(path) as file:
            return file.readline().lstrip().startswith(b"[")
    except (*DAMAGE, OSError):
        return False


def _checked(path: Path, text_field: str) -> Iterator[tuple[int, str, str]]:
    """(line, text, "") of each document, or (line, "", reason) if it is unreadable."""
    line = 0

    def read_from(had: int) -> Iterator[tuple[int, Any]]:
        return islice(reader_of(path)(path, text_field), had, None)

    try:
        for line, text in retried(read_from, printable(path)):
            readable = is_text(text)
            yield line, text if readable else "", "" if readable else no_text(text_field)
    except FileNotFoundError as error:
        raise RunFailed(f"{printable(path)} was removed while it was to be read; start again") from error
    except (*DAMAGE, OSError) as error:
        if not is_damage(error):
            raise
        yield line + 1, "", str(error)


def no_text(text_field: str) -> str:
    """The reason to report for a row without a text."""
    return f"no text in field {text_field!r}"


def is_text(text: Any) -> bool:
    """Whether a tokenizer accepts the value: JSON strings may hold half of a surrogate pair, UTF-8 cannot."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False
