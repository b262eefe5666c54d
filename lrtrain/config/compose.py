"""From what Hydra composed, or a run stored, to the typed `Config`."""

from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import lrtrain
from lrtrain.config.choice import check_choice, unknown_key
from lrtrain.config.naming import run_name
from lrtrain.config.schema import Config
from lrtrain.errors import ConfigError


def typed(composed: DictConfig) -> Config:
    """The composed configuration with every interpolation resolved and every type checked.

    Raises:
        ConfigError: for an unknown or missing key, or a value of the wrong type.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error, composed)) from error
    for section in ("param", "optim", "schedule", "engine"):
        check_choice(section, getattr(config, section), composed)
    for name, node in config.callbacks.items():
        check_choice(f"callbacks.{name}", node, composed)
    if config.init_from is not None and config.data.tokenizer.path is None:
        config.data.tokenizer.path = tokenizer_of(config.init_from, Path(config.run.dir))
    return config


def tokenizer_of(init_from: str, run_dir: Path) -> str:
    """Where the tokenizer is that belongs to weights: the run's own copy, once it has one, or with the weights, which
    may be a run's, a checkpoint's, or another model's."""
    weights = Path(init_from)
    copies = (run_dir / "tokenizer", weights / "tokenizer", weights.parent.parent / "tokenizer")
    return next((str(copy) for copy in copies if copy.is_dir()), init_from)


def sentence(error: OmegaConfBaseException, composed: DictConfig) -> str:
    """What a user reads of an OmegaConf error: the key, its value and what would be right, on one line."""
    key = error.full_key or ""
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value; give one, as in {key}=…"
    if "not in struct" in str(error.msg) or "not in 'Config'" in str(error.msg) or "Key '" in str(error.msg):
        return unknown_key(key, composed)
    value = OmegaConf.select(composed, key, throw_on_missing=False) if key else None
    reason = str(error.msg).splitlines()[0].strip()
    return f"{key}={value}: {reason[0].lower()}{reason[1:]}"


def composition_sentence(error: Exception) -> str:
    """What a user reads of an error that Hydra met while composing: one line."""
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "not in struct" in str(cause.msg):
        return unknown_key(cause.full_key, default_composition())
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def default_composition(*overrides: str) -> DictConfig:
    """conf/pretrain.yaml with overrides, composed outside of a Hydra job."""
    instance = GlobalHydra.instance()
    job = instance.hydra  # of the Hydra job within which this may be called
    instance.clear()
    conf = Path(lrtrain.__file__).resolve().parent / "conf"  # in a clone a link to conf/
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            return hydra.compose("pretrain", overrides=list(overrides))
    finally:
        instance.hydra = job


def compose(*overrides: str) -> Config:
    """The configuration that `launch/pretrain.py` would make of these overrides: for scripts and tests.

    Raises:
        ConfigError: as `typed`.
    """
    composed = default_composition(*overrides)
    if composed.run.name is None:
        composed.run.name = run_name(composed, list(overrides))
    return typed(composed)


def from_stored(plain: dict[str, Any]) -> Config:
    """The configuration of a run as its checkpoints have it; keys that came later have their defaults.

    Raises:
        ConfigError: as `typed`.
    """
    stored = OmegaConf.create(plain)
    chosen = [f"{group}={stored[group].name}" for group in ("param", "optim", "schedule", "engine")]
    for section, defaults in default_composition(*chosen).items():
        if section not in stored:
            stored[section] = defaults
        elif isinstance(defaults, DictConfig):
            for key in defaults.keys() - stored[section].keys():
                stored[section][key] = defaults[key]
    return typed(stored)
