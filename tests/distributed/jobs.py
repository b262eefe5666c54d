"""Runs several configurations one after another in the same processes: saves importing everything for each.

torchrun --nproc_per_node=2 tests/distributed/jobs.py '[["run.dir=a", ...], ["run.dir=b", ...]]'
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lrtrain.config import check, compose
from lrtrain.distributed import environment_world_size
from lrtrain.train import pretrain

for overrides in json.loads(sys.argv[1]):
    config = compose(*overrides)
    check(config, environment_world_size())
    pretrain(config)
