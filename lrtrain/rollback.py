"""A loss that spikes: back to a checkpoint from before it, and on without the batches that came with it.

As PaLM was trained (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1): the same batches on other weights gave no
spike, so a restart that leaves them out is a run that goes on, and not one that hides something.
"""

import statistics
from pathlib import Path

from lrtrain.checkpoint import newest_sound, read_meta, remove, whole_checkpoints
from lrtrain.config import RollbackConfig
from lrtrain.errors import RunFailed

Window = list[int]
"""[first, end): positions of sequences in the order of the data."""


class Spike(RunFailed):
    """The run goes on from an earlier checkpoint, without the windows of `left_out`."""

    def __init__(self, sentence: str, left_out: list[Window]):
        super().__init__(sentence)
        self.left_out = left_out


def spike_of(loss: float, recent: list[float], config: RollbackConfig) -> str | None:
    """What makes a loss a spike, in a few words; None if it is none.

    It is one above median + spike · MAD of the last `window` losses, MAD the median absolute deviation from the median;
    none before there are so many.
    """
    if config.spike is None or len(recent) < config.window:
        return None
    median = statistics.median(recent)
    deviation = statistics.median(abs(value - median) for value in recent)
    if loss <= median + config.spike * deviation:
        return None
    return (
        f"the loss {loss:.4g} is a spike: above {median:.4g} + rollback.spike={config.spike:g} × {deviation:.2g}, as "
        f"the last {config.window} were"
    )


def beyond(position: int, batch_size: int, left_out: list[Window]) -> int:
    """The first position from `position` on whose batch touches no window."""
    for first, end in sorted(left_out):
        if position < end and position + batch_size > first:
            position = end
    return position


def checkpoint_before(folder: Path, position: int) -> Path | None:
    """The newest whole checkpoint that has seen nothing from `position` on; None if there is none."""
    found = [c for c in whole_checkpoints(folder) if read_meta(c)["progress"]["position"] <= position]
    return found[-1] if found else None


def take_back(folder: Path, checkpoint: Path) -> Path | None:
    """Remove the checkpoints after `checkpoint`; what a run goes on from then."""
    for later in reversed(whole_checkpoints(folder)):
        if later.name > checkpoint.name:
            remove(later)
    return newest_sound(folder)
