"""Runs several configurations one after another in the same processes: saves importing everything for each.

Only the last one draws its picture, which takes longer than the tests' trainings.

torchrun --nproc_per_node=2 tests/distributed/jobs.py '[["run.dir=a", ...], ["run.dir=b", ...]]'
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lrtrain.config import check, compose
from lrtrain.distributed import environment_world_size
from lrtrain.train import pretrain

jobs = json.loads(sys.argv[1])
for i, overrides in enumerate(jobs):
    config = compose(*overrides)
    check(config, environment_world_size())
    with nullcontext() if i + 1 == len(jobs) else patch("lrtrain.plots.plot_run", lambda run: run / "no picture"):
        pretrain(config)
