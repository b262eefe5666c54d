"""`meta.json`: everything in a checkpoint besides tensors."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from lrtrain.config.home import HomeRecord
from lrtrain.errors import ConfigError

META = "meta.json"
T = TypeVar("T")

Window = list[int]
"""[first, end): positions of sequences in the order of the data."""


@dataclass
class Progress:
    """The progress of a run: what resuming needs besides model, optimizer and the state of the data source."""

    step: int = 0
    """Completed optimizer steps, including skipped ones."""
    position: int = 0
    """Sequences consumed: the next step takes position … position + batch_size − 1 of the data's order."""
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Seconds spent in steps, without callbacks and checkpoints."""
    recent: list[float] = field(default_factory=list)
    """The last losses that were not spikes, for `rollback`."""
    left_out: list[Window] = field(default_factory=list)
    """Windows of the data that rollbacks have skipped."""


@dataclass
class DataState:
    """The identity of the data and the state of its stream."""

    fingerprint: str
    state: Any


@dataclass
class CheckpointMeta:
    """Everything a checkpoint holds besides tensors."""

    step: int
    progress: Progress
    data: DataState
    config: dict[str, Any]
    """The whole configuration, as plain containers."""
    support_hash: str
    executed: str
    """The dtype and device that `executions` were measured with."""
    versions: dict[str, str]
    world_size: int
    executions: dict[str, str] = field(default_factory=dict)
    """The execution of each layer that was autotuned."""
    ranks: dict[str, int] = field(default_factory=dict)
    """The exact ranks of the model's `RankPlan`."""
    architecture: dict[str, Any] | None = None
    """The config of the transformers model."""
    run_id: str = ""
    """What tells the run from all others, as its run.json has it."""
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The state of each callback, by its name in the configuration."""
    home: HomeRecord = field(default_factory=HomeRecord)
    """What the run has from folders outside lrtrain."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointMeta":
        plain = json.loads(text)
        plain["progress"] = of_known_fields(Progress, plain["progress"])
        plain["data"] = of_known_fields(DataState, plain["data"])
        plain["home"] = of_known_fields(HomeRecord, plain.get("home", {}))
        return of_known_fields(cls, plain)


def read_meta(checkpoint: Path) -> CheckpointMeta:
    """The meta of a checkpoint.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        return CheckpointMeta.from_json((checkpoint / META).read_text())
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{checkpoint / META} is damaged: {error}") from error


def of_known_fields(kind: type[T], values: dict[str, Any]) -> T:
    """An instance of a dataclass from the values of its fields; checkpoints of other versions may have more values."""
    names = {f.name for f in fields(kind)}  # pyright: ignore[reportArgumentType]
    return kind(**{name: value for name, value in values.items() if name in names})
