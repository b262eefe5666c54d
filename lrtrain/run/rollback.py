"""Rollback: after a loss spike, training resumes from an earlier checkpoint and skips the batches around the spike.

As in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1), where the same batches gave no spike on other
weights.
"""

import statistics
import sys
from pathlib import Path

from lrtrain.checkpoint.checkpointer import Checkpointer, last_good, newest_sound, remove, whole_checkpoints
from lrtrain.checkpoint.meta import Progress, Window, read_meta
from lrtrain.config.schema import Config, RollbackConfig
from lrtrain.distributed.collectives import run_on_rank0
from lrtrain.distributed.world import World
from lrtrain.errors import RunFailed


class Diverged(RunFailed):
    """The loss or gradient was not finite for too many steps in a row, or spiked too often."""


class Spike(RunFailed):
    """Raised to resume from an earlier checkpoint, skipping the windows in `left_out`."""

    def __init__(self, sentence: str, left_out: list[Window]):
        super().__init__(sentence)
        self.left_out = left_out


def watch(
    loss: float, skipped: bool, progress: Progress, config: Config, checkpointer: Checkpointer, world: World
) -> None:
    """Roll back if the last step was a spike, or too many steps in a row were skipped. A collective.

    Raises:
        Spike: if `train` is to resume from an earlier checkpoint.
        Diverged: after `train.max_skipped` steps in a row without a finite loss and gradient, or a spike after
            `rollback.most` rollbacks.
    """
    rollback, most = config.rollback, config.train.max_skipped
    if not skipped:
        reason = spike_of(loss, progress.recent, rollback)
        if reason:
            _roll_back(reason, rollback.skip, progress, config, checkpointer, world)
        progress.recent = [*progress.recent, loss][-rollback.window :]
    elif progress.skipped_in_a_row >= most:
        reason = f"the loss or gradient was not finite for train.max_skipped={most} steps in a row"
        if rollback.spike is not None:
            _roll_back(reason, max(rollback.skip, most), progress, config, checkpointer, world)
        checkpointer.wait()
        raise Diverged(f"{reason}; {last_good(checkpointer.folder)}")


def _roll_back(
    reason: str, batches: int, progress: Progress, config: Config, checkpointer: Checkpointer, world: World
) -> None:
    """Raise Spike to skip the last batches; return if there is no checkpoint from before them."""
    folder, most = checkpointer.folder, config.rollback.most
    first = max(0, progress.position - batches * config.train.batch_size)
    checkpointer.wait()
    checkpoint = run_on_rank0(lambda: checkpoint_before(folder, first))
    if len(progress.left_out) >= most:
        raise Diverged(f"step {progress.step}: {reason}, after rollback.most={most} rollbacks; {last_good(folder)}")
    back = run_on_rank0(lambda: take_back(folder, checkpoint)) if checkpoint else None
    told = f"step {progress.step}: {reason}; " + (
        f"going back to {back} and on without the sequences {first} … {progress.position - 1}"
        if back
        else "there is no checkpoint from before it to go back to"
    )
    if world.main:
        print(told, file=sys.stderr, flush=True)
    if back:
        raise Spike(told, [*progress.left_out, [first, progress.position]])


def spike_of(loss: float, recent: list[float], config: RollbackConfig) -> str | None:
    """A description of the spike if `loss` is one, else None.

    A spike is above median + spike · MAD of the last `window` losses (MAD: median absolute deviation from the median).
    With fewer losses there is no spike.
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
    """The first position ≥ `position` whose batch overlaps no window."""
    for first, end in sorted(left_out):
        if position < end and position + batch_size > first:
            position = end
    return position


def checkpoint_before(folder: Path, position: int) -> Path | None:
    """The newest complete checkpoint that has seen no sequence from `position` on; None if there is none."""
    found = [c for c in whole_checkpoints(folder) if read_meta(c).progress.position <= position]
    return found[-1] if found else None


def take_back(folder: Path, checkpoint: Path) -> Path | None:
    """Remove the checkpoints after `checkpoint`; returns the checkpoint to resume from."""
    for later in reversed(whole_checkpoints(folder)):
        if later.name > checkpoint.name:
            remove(later)
    return newest_sound(folder)
