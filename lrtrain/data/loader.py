"""Training data: batches that are a function of the position, for any number of processes."""

from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from lrtrain.data.faults import Faults
from lrtrain.data.order import sample_rows
from lrtrain.data.packing import PackedRows
from lrtrain.data.streams import Cursor, TokenStream
from lrtrain.errors import ConfigError

READ_AHEAD = 2
"""Number of batches that may be read before they are due."""


class TrainData(Protocol):
    """The interface of training data. Sample p is the same for every batch size and number of processes."""

    faults: Faults
    """What this process could not read in its batches."""

    def batch(self, position: int, batch_size: int, dist_rank: int, world_size: int) -> torch.Tensor:
        """This process's share of samples position … position + batch_size - 1.

        `batch_size` is of all processes together and divisible by `world_size`; the result is
        (batch_size // world_size, seq_len + 1) int64.
        """
        ...

    def state(self, position: int) -> dict[str, Any]:
        """The state to resume from `position`, JSON-serializable; a collective.

        `position` is where one of the last `READ_AHEAD + 1` batches read began, or where the last one ended.
        """
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class PackedTrain:
    """Packed rows in the order of lrtrain.data.order. A process takes a contiguous slice of the batch."""

    def __init__(self, rows: PackedRows, seed: int):
        self.faults = Faults(refuse=True)  # packed rows have none
        self._rows = rows
        self._seed = seed

    def batch(self, position: int, batch_size: int, dist_rank: int, world_size: int) -> torch.Tensor:
        share = batch_size // world_size
        positions = position + dist_rank * share + np.arange(share)
        return self._rows.rows(sample_rows(positions, len(self._rows), self._seed))

    def state(self, position: int) -> dict[str, Any]:
        return {}  # the position is enough

    def load_state(self, state: dict[str, Any]) -> None:
        pass


class StreamedTrain:
    """Sample p is the next sequence of canonical stream p mod K; file i belongs to stream i mod K.

    A process takes the samples p with p mod world_size == dist_rank, so it reads only the streams k with
    k mod world_size == dist_rank. Batches are read in order: `batch` needs the position where the last one
    ended, that of the loaded state, or a later one; samples in between are read and dropped.
    """

    def __init__(
        self,
        files: list[str],
        text_field: str,
        streams: int,
        tokenizer: PreTrainedTokenizerFast,
        seq_len: int,
        faults: Faults,
    ):
        self.faults = faults
        self._files = files
        self._text_field = text_field
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self._cursors = [Cursor()] * streams
        self._open: dict[int, TokenStream] = {}
        self._reached: dict[int, dict[int, Cursor]] = {0: {}}  # position → cursor of each stream of this process

    def batch(self, position: int, batch_size: int, dist_rank: int, world_size: int) -> torch.Tensor:
        """See TrainData. Raises ConfigError if the number of streams is not a multiple of that of processes."""
        count = len(self._cursors)
        if count % world_size:
            raise ConfigError(f"data.streams={count} must be a multiple of the {world_size} processes")
        last = max(self._reached)
        if position < last:
            raise RuntimeError(f"streamed data is at {last}, beyond {position}: load its state")
        for p in range(last, position):
            if p % world_size == dist_rank:
                self._stream(p % count).next_sequence()
        mine = [p for p in range(position, position + batch_size) if p % world_size == dist_rank]
        sequences = np.stack([self._stream(p % count).next_sequence() for p in mine])
        # Set in one assignment, after reading: `state` may be called while another thread reads, for the end of a batch
        # before those that were read ahead.
        here = {k: stream.cursor for k, stream in self._open.items()}
        self._reached = dict([*self._reached.items(), (position + batch_size, here)][-(READ_AHEAD + 2) :])
        return torch.from_numpy(sequences.astype(np.int64))

    def state(self, position: int) -> dict[str, Any]:
        """The position and the cursor of every stream, gathered from the processes that read them."""
        cursors = dict(enumerate(self._cursors))
        for reached in _gather(self._reached[position]):
            cursors |= reached
        return {"position": position, "streams": [asdict(cursors[k]) for k in sorted(cursors)]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume from `state`, saved on any number of processes. Raises ConfigError if the number of streams
        differs."""
        if len(state["streams"]) != len(self._cursors):
            raise ConfigError(f"data.streams={len(self._cursors)} must be {len(state['streams'])}, as when saved")
        self._cursors = [Cursor(**cursor) for cursor in state["streams"]]
        self._open = {}
        self._reached = {state["position"]: {}}

    def _stream(self, k: int) -> TokenStream:
        if k not in self._open:
            self._open[k] = TokenStream(
                self._files[k :: len(self._cursors)],
                self._text_field,
                self._tokenizer,
                self._seq_len,
                self._cursors[k],
                self.faults,
            )
        return self._open[k]


def _gather(mine: dict[int, Cursor]) -> list[dict[int, Cursor]]:
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts
