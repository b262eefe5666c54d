"""One stream of a streamed corpus, and the cursor to resume it.

The cursor is the file, row and token where the next sequence starts. Resuming skips rows of one file, so a
stream resumes exactly any number of times, no matter what was read ahead.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
from transformers import PreTrainedTokenizerFast

from lrtrain.data.encoding import encode_documents
from lrtrain.data.faults import Faults
from lrtrain.data.sources import json_batches
from lrtrain.errors import ConfigError


@dataclass(frozen=True)
class Cursor:
    """The first token of a stream's next sequence."""

    epoch: int = 0  # passes over the stream's files so far
    file: int = 0  # of the stream's own files
    row: int = 0  # of the file, including empty ones
    token: int = 0  # of the row's document


class TokenStream:
    """The documents of `files`, EOS after each, repeated endlessly, as sequences that overlap by one token."""

    def __init__(
        self,
        files: list[str],
        text_field: str,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        cursor: Cursor,
        faults: Faults,
    ):
        self.cursor = cursor
        self._files = files
        self._text_field = text_field
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._faults = faults
        self._ahead = self._documents(cursor)
        self._queue: deque[tuple[Cursor, np.ndarray]] = deque()  # starts with the document of the cursor

    def next_sequence(self) -> np.ndarray:
        """The next (seq_len + 1,) int32; the cursor moves by seq_len."""
        available = sum(len(tokens) for _, tokens in self._queue) - self.cursor.token
        while available <= self._seq_len:
            self._queue.append(next(self._ahead))
            available += len(self._queue[-1][1])
        start, stop = self.cursor.token, self.cursor.token + self._seq_len + 1
        sequence = np.concatenate([tokens for _, tokens in self._queue])[start:stop]
        self._move_to(start + self._seq_len)
        return sequence

    def _move_to(self, token: int) -> None:
        """Move the cursor to `token`, counted from the first queued document, and drop documents before it."""
        while token >= len(self._queue[0][1]):
            token -= len(self._queue.popleft()[1])
        self.cursor = replace(self._queue[0][0], token=token)

    def _documents(self, cursor: Cursor) -> Iterator[tuple[Cursor, np.ndarray]]:
        """(start, ids and EOS) of each document from the row of `cursor` on, epoch after epoch."""
        first_file, first_row = cursor.file, cursor.row
        for epoch in count(cursor.epoch):
            found = False
            for file in range(first_file, len(self._files)):
                for row, tokens in self._rows(file, first_row):
                    found = True
                    yield Cursor(epoch, file, row), tokens
                first_row = 0
            if not found:
                raise ConfigError(f"data.path: no text in {', '.join(self._files)}; give files with documents")
            first_file = 0

    def _rows(self, file: int, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """(row, ids and EOS) of a file's nonempty rows from `start` on."""
        for rows in json_batches(self._files[file], self._text_field, start, self._faults):
            documents = encode_documents(self._tokenizer, [text for _, text in rows])
            yield from ((row, tokens) for (row, _), tokens in zip(rows, documents, strict=True))
