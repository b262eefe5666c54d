"""What a script that starts runs again, such as launch/slurm.sbatch, is told of a run: whether it is worth it."""

import os
from pathlib import Path

UNFINISHED = "LRTRAIN_UNFINISHED"
"""Names a file on a disk that all hosts share. It is there if this start saved a checkpoint, or was stopped by a
signal, and the run has not finished: another start goes on from there. It is not there after a mistake."""


def note_unfinished() -> None:
    """For the main process: another start goes on from what is saved."""
    if path := os.environ.get(UNFINISHED):
        Path(path).touch()


def note_finished() -> None:
    """For the main process: nothing is left to do."""
    if path := os.environ.get(UNFINISHED):
        Path(path).unlink(missing_ok=True)
