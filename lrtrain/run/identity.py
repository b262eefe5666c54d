"""The identity of a run, unique even among runs of the same name: `run.json` in its directory."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lrtrain.checkpoint.meta import CheckpointMeta, of_known_fields
from lrtrain.config.home import HomeRecord
from lrtrain.config.schema import Config
from lrtrain.core.files import write_durably

RUN = "run.json"


@dataclass
class RunIdentity:
    """Stays the same when the run is resumed."""

    id: str
    name: str
    executed: str = ""
    """The dtype and device that `executions` were measured with."""
    executions: dict[str, str] = field(default_factory=dict)
    """The execution of each layer that was autotuned: another one rounds differently, and resuming is not exact."""
    home: HomeRecord = field(default_factory=HomeRecord)
    """What the run has from folders outside lrtrain."""

    def write(self, run_dir: Path) -> None:
        write_durably(run_dir / RUN, json.dumps(asdict(self)))


def known_run(config: Config, meta: CheckpointMeta | None) -> RunIdentity | None:
    """The identity of the run that `resume=auto` resumes, from run.json or, if that is damaged, from the checkpoint;
    None if there is no run yet."""
    if config.resume != "auto":
        return None
    path = Path(config.run.dir) / RUN
    try:
        found = of_known_fields(RunIdentity, json.loads(path.read_text()))
        if isinstance(found.id, str) and isinstance(found.executions, dict):
            return found
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        print(f"{path} is damaged and is rewritten", file=sys.stderr, flush=True)
    return RunIdentity(meta.run_id, config.run.name) if meta and meta.run_id else None
