"""The jobs of a sweep, named by a hash of their overrides, so that a sweep that is restarted, or started with more
values, finds its finished jobs."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

from lrtrain.config.check import check, check_directories
from lrtrain.config.choice import choice
from lrtrain.config.compose import typed
from lrtrain.config.naming import DEFAULT, run_name, short_hash, telling
from lrtrain.core.files import make_folder_durably, read_object, write_durably
from lrtrain.errors import ConfigError

FAILURE = "LRTRAIN_FAILURE"  # environment variable: the file to which a failing job writes its error message


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    composed: DictConfig
    arguments: list[str]
    """Of launch/pretrain.py: what starts this job alone."""

    @property
    def run_dir(self) -> Path:
        return Path(self.composed.run.dir)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What summary.json says of a finished job; None if it has not finished, or the file is damaged: then the job
        resumes from its last checkpoint, and rewrites the file."""
        return read_object(self.run_dir / "summary.json")


Status = Literal["finished", "failed", "stopped", "submitted", "not started"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: str
    status: Status
    detail: str = ""
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether its result is known: it was not stopped, and is not on its way."""
        return self.status in ("finished", "failed")


@dataclass(frozen=True)
class Sweep:
    """The common properties of a sweep's jobs."""

    name: str
    folder: Path
    swept: list[str]
    """The keys that differ between the jobs."""
    config_name: str = DEFAULT
    """What the jobs are composed from, if not conf/pretrain.yaml."""
    options: Sequence[str] = ()
    """Of launch/pretrain.py, for the same configuration to be composed in another process."""

    def job(self, overrides: Sequence[str], composed: DictConfig) -> Job:
        """The job of these overrides; if its run directory exists, it is resumed."""
        name = job_name(overrides, self.swept, self.config_name)
        folder = self.folder / name
        known = composed.resume == "never" or (folder / "run.json").is_file()
        place = {
            "run.name": f"{self.name}/{name}",
            "run.dir": str(folder),
            "resume": "auto" if known else composed.resume,
            "tracking.group": composed.tracking.group or self.name,
        }
        with open_dict(composed):
            composed.pop("hydra", None)
        for key, value in place.items():
            OmegaConf.update(composed, key, value)
        others = [override for override in overrides if override.partition("=")[0] not in place]
        placed = [f"{key}={quoted(value)}" for key, value in place.items()]
        return Job(name, composed, [*self.options, *others, *placed])


def plan_sweep(
    composed: DictConfig,
    overrides: list[str],
    swept: Sequence[str],
    config_name: str = DEFAULT,
    options: Sequence[str] = (),
) -> Sweep:
    """The sweep of a command line.

    Args:
        composed: the configuration without what is swept; `run.name` and `run.dir` are the sweep's, if given.
        overrides: the command line's, the swept ones too.
        swept: keys that the sweeper has beside those of the command line.
        config_name, options: see `Sweep`.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    keys = [*swept, *(key_of(one) for one in parsed if one.is_sweep_override())]
    if composed.run.name is None:
        fixed = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
        by = "-".join(key.rsplit(".", 1)[-1] for key in keys)
        composed.run.name = f"{run_name(composed, fixed, keys, config_name)}-by-{by}".lstrip("-")
    return Sweep(composed.run.name, Path(composed.run.dir), keys, config_name, options)


def key_of(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def job_name(overrides: Sequence[str], swept: Sequence[str], config_name: str = DEFAULT) -> str:
    """`rank16-lr0.002-1a2b3c4d`: the swept values, and a hash of all overrides that change the run."""
    composed_from = [] if config_name == DEFAULT else [f"--config-name={config_name}"]
    values = {key: value for key, _, value in (override.lstrip("+~").partition("=") for override in overrides)}
    readable = "-".join(label(key, values[key]) for key in swept if key in values)
    return f"{readable[:80]}-{short_hash([*composed_from, *telling([*overrides])])}".lstrip("-")


def label(key: str, value: str) -> str:
    """`rank16` for param.rank=16, `sltrain` for param=sltrain; only characters allowed in file names."""
    try:
        value = f"{float(value):.4g}" if "." in value or "e" in value else value
    except ValueError:
        pass
    return re.sub(r"[^\w.%+-]+", "_", (key.rsplit(".", 1)[-1] if "." in key else "") + value).strip("_")


def quoted(value: str | Sequence[str]) -> str:
    """A string, or a list of strings, quoted for Hydra's grammar."""
    if not isinstance(value, str):
        return f"[{','.join(map(quoted, value))}]"
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def outcome_without_start(job: Job, world_size: int) -> Outcome | None:
    """The outcome of a job that has finished or has a wrong configuration; None if it has to be started."""
    if (summary := job.summary) is not None:
        return Outcome(job.name, "finished", "before", summary)
    if (sentence := problem(job, world_size)) is not None:
        return Outcome(job.name, "failed", sentence)
    return None


def problem(job: Job, world_size: int) -> str | None:
    """The error in a job's configuration, as far as it can be found without a process group; None if there is none."""
    from lrtrain.data.prepare import check_data, check_fits
    from lrtrain.model.build import make_model
    from lrtrain.planning.budget import spend

    try:
        config = spend(typed(job.composed))
        check(config, world_size)
        check_directories(config)
        check_data(config.data)
        model = make_model(config)
        choice(config.optim)(model)
        text = model.config.get_text_config()
        check_fits(config.data, text.vocab_size, getattr(text, "max_position_embeddings", None))
    except ConfigError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_outcomes(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Note in `<sweep>/jobs.json` how jobs ended; what other sweeps left there stays."""
    path = folder / "jobs.json"
    known = read_object(path) or {}
    known |= {one.job: {"status": one.status, "detail": one.detail} for one in outcomes if one.status != "not started"}
    make_folder_durably(folder)
    write_durably(path, json.dumps(known, indent=1))
