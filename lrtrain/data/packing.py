"""Packing documents into rows of tokens in memory-mapped Arrow files.

The documents of a split, with EOS after each, form one stream of tokens. Row i is stream[i·T : i·T + T + 1] for
T = seq_len: consecutive rows share one token, so that every token of the stream after the first is a target
exactly once. Fewer than T tokens at the end are dropped.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lrtrain.data.encoding import encode_documents

log = logging.getLogger(__name__)

BATCH_CHARACTERS = 4_000_000  # encoded at a time, on all cores
WRITE_ROWS = 1024


class PackedRows:
    """Packed sequences in a memory-mapped Arrow file, with random access."""

    def __init__(self, path: Path):
        self._dataset = Dataset.from_file(str(path)).with_format("numpy")

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Rows `indices` (k,) in their order: (k, seq_len + 1) int64."""
        return torch.from_numpy(self._dataset[list(indices)]["tokens"].astype(np.int64))


class RowWriter:
    """Splits a stream of tokens into overlapping rows and writes them to `path`."""

    def __init__(self, path: Path, seq_len: int):
        self.seq_len = seq_len
        self.tokens = 0
        self.rows = 0
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._features = Features({"tokens": List(Value("int32"), length=seq_len + 1)})
        self._writer = ArrowWriter(features=self._features, path=str(path))

    def add(self, tokens: np.ndarray) -> None:
        """Append `tokens` (n,) int32 to the stream."""
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        self.tokens += len(tokens)
        if self._pending_tokens > WRITE_ROWS * self.seq_len:
            self._write_complete_rows()

    def close(self) -> None:
        self._write_complete_rows()
        self._writer.finalize()

    def _write_complete_rows(self) -> None:
        stream = np.concatenate([np.empty(0, np.int32), *self._pending])
        count = max(0, len(stream) - 1) // self.seq_len
        rest = stream[count * self.seq_len :]  # its first token is the last of the previous row
        if count:
            windows = np.lib.stride_tricks.sliding_window_view(stream, self.seq_len + 1)[:: self.seq_len]
            rows = pa.FixedSizeListArray.from_arrays(pa.array(windows.ravel()), self.seq_len + 1)
            self._writer.write_table(pa.table([rows], schema=self._features.arrow_schema))
        self.rows += count
        self._pending, self._pending_tokens = [rest], len(rest)


def pack_split(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, seq_len: int, fraction: float, folder: Path
) -> None:
    """Write `train.arrow` and `validation.arrow` into `folder`, split by `is_validation`."""
    train = RowWriter(folder / "train.arrow", seq_len)
    validation = RowWriter(folder / "validation.arrow", seq_len)
    count = 0
    for text, tokens in tokenized(documents, tokenizer):
        (validation if is_validation(text, fraction) else train).add(tokens)
        count += 1
    for name, writer in (("train", train), ("validation", validation)):
        writer.close()
        log.info("%s: %d tokens in %d sequences", name, writer.tokens, writer.rows)
    log.info("packed %d documents", count)


def pack_first(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerFast, seq_len: int, rows: int, folder: Path
) -> None:
    """Write `validation.arrow` into `folder`: the first `rows` rows of the documents, or fewer."""
    writer = RowWriter(folder / "validation.arrow", seq_len)
    missing = rows * seq_len + 1 if rows else 0
    for _, tokens in tokenized(documents, tokenizer):
        writer.add(tokens[:missing])
        missing -= len(tokens[:missing])
        if not missing:
            break
    writer.close()


def is_validation(text: str, fraction: float) -> bool:
    """Whether a document is held out, by a hash of its text, independent of other documents."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest) < fraction * 2**64


def tokenized(documents: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, np.ndarray]]:
    """(text, ids and EOS) of each document, with a progress bar on stderr if it takes long."""
    with tqdm(desc="tokenizing", unit=" tokens", unit_scale=True, delay=5, leave=False) as bar:
        for texts in _batches(documents):
            for text, tokens in zip(texts, encode_documents(tokenizer, texts), strict=True):
                yield text, tokens
                bar.update(len(tokens))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents with about BATCH_CHARACTERS in total."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
