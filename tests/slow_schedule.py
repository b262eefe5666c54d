"""A schedule for jobs that are not to end before their time is up."""

import os
import time

from lrtrain.config.ranges import ShareOfSteps
from lrtrain.optim.schedules import constant

_seen: list[int] = []
"""Steps of this process."""


def slow_from_the_beginning(step: int, steps: int, warmup: ShareOfSteps) -> float:
    """`constant`, with one step in a second in a job of Slurm that begins at step 0."""
    _seen.append(step)
    if "SLURM_JOB_ID" in os.environ and _seen[0] == 0:
        time.sleep(1)
    return constant(step, steps, warmup)
