"""The name of a run, the hash of a configuration, and what differs between two."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from lrtrain.config.schema import Config, as_dict


def fingerprint(config: Config) -> str:
    """A hash of the whole resolved configuration: all processes must agree on it."""
    text = json.dumps(as_dict(config), sort_keys=True)
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
"""Overrides that make no other run: the same one can be resumed with other values."""

DEFAULT = "pretrain"  # the configuration that is composed where --config-name names no other


def run_name(
    composed: DictConfig, overrides: list[str], swept: Sequence[str] = (), config_name: str | None = DEFAULT
) -> str:
    """The name of a run that was given none: the experiment's, or <model>-<param>, and a hash of the other overrides
    if there are any; before it that of the configuration, if it is not conf/pretrain.yaml.

    A function of the command line alone, so all processes and a requeued job find the same run. Of a sweep, whose
    `swept` keys have no value of their own, these are left out.
    """
    experiments = [o.removeprefix("experiment=") for o in overrides if o.startswith("experiment=")]
    subjects = [composed[group].name for group in ("model", "param") if group not in swept]
    name = experiments[-1] if experiments else "-".join(subjects)
    name = name if config_name == DEFAULT else f"{config_name}-{name}"
    named = ("experiment=",) if experiments else ("model=", "param=")
    others = [o for o in telling(overrides) if not o.lstrip("+~").startswith((*named, *LENGTH_AND_CADENCE))]
    return f"{name}-{short_hash(others)}" if others else name


def telling(overrides: list[str]) -> list[str]:
    """The overrides that change what a run computes: not where it is kept, shown or taken up from."""
    aside = ("resume=", "dry_run=", "run.", "tracking", "hydra")
    return [o for o in overrides if not o.lstrip("+~").startswith(aside)]


def short_hash(overrides: list[str]) -> str:
    """Eight digits that stand for overrides, in whatever order."""
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
