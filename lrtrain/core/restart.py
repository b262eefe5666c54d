"""Telling a script that restarts runs, such as launch/slurm.sbatch, whether another start makes sense."""

import os
from pathlib import Path

UNFINISHED = "LRTRAIN_UNFINISHED"
"""Environment variable with the path of a file on a shared disk. The file exists if the run has not finished, and this
start saved a checkpoint or was stopped by a signal; it does not exist after a wrong configuration."""


def note_unfinished() -> None:
    """Create the file: another start can resume the run. Called by the main process."""
    if path := os.environ.get(UNFINISHED):
        Path(path).touch()


def note_finished() -> None:
    """Remove the file: the run has finished. Called by the main process."""
    if path := os.environ.get(UNFINISHED):
        Path(path).unlink(missing_ok=True)
