"""The name of a run, the hash of a configuration, and the differences between two configurations."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from lrtrain.config.schema import Config, as_dict


def fingerprint(config: Config) -> str:
    """A hash of the resolved configuration that all processes must agree on: all of it but `tracking`, which the main
    process alone reads, and whose WANDB_* variables other hosts may not have."""
    text = json.dumps(as_dict(config) | {"tracking": None}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


LENGTH_AND_CADENCE = (
    "train.steps=",
    "train.flops=",
    "train.log_every=",
    "train.timeout_minutes=",
    "train.max_skipped=",
    "train.profile=",
    "eval.",
    "spectra",
    "checkpoint.",
    "rollback.",
    "callbacks",
)
"""Overrides that do not change the run's name: a run can be resumed with other values of these."""

DEFAULT = "pretrain"  # the default of --config-name


def run_name(
    composed: DictConfig, overrides: list[str], swept: Sequence[str] = (), config_name: str | None = DEFAULT
) -> str:
    """The default name of a run: <experiment> or <model>-<param>, and a hash of the other overrides if there are any;
    prefixed by the configuration's name if it is not conf/pretrain.yaml.

    A function of the command line only, so that all processes and a requeued job find the same run. The name of a sweep
    leaves out its `swept` keys.
    """
    experiments = [o.removeprefix("experiment=") for o in overrides if o.startswith("experiment=")]
    subjects = [str(composed[group].get("name")) for group in ("model", "param") if group not in swept]
    name = experiments[-1] if experiments else "-".join(subjects)
    name = name if config_name == DEFAULT else f"{config_name}-{name}"
    named = ("experiment=",) if experiments else ("model=", "param=")
    others = [o for o in telling(overrides) if not o.lstrip("+~").startswith((*named, *LENGTH_AND_CADENCE))]
    return f"{name}-{short_hash(others)}" if others else name


def telling(overrides: list[str]) -> list[str]:
    """The overrides that change what a run computes (not its directory, tracking or resuming)."""
    aside = ("resume=", "dry_run=", "gpu", "run.", "tracking", "hydra")
    return [o for o in overrides if not o.lstrip("+~").startswith(aside)]


def short_hash(overrides: list[str]) -> str:
    """An eight-digit hash of overrides, independent of their order."""
    return hashlib.blake2b("\n".join(sorted(overrides)).encode(), digest_size=4).hexdigest()


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys → leaf values."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, child in node.items() for k, v in flat(child, f"{prefix}.{key}" if prefix else key).items()}


def differing(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ → (old, new)."""
    before, after = flat(old), flat(new)
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
