"""Making the typed `Config` from Hydra's composition or a stored configuration."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lrtrain.config.choice import CALLED_WITH, checked_choice
from lrtrain.config.home import CONF, add_homes_of, configurations, import_from_homes, search_homes
from lrtrain.config.naming import DEFAULT, run_name
from lrtrain.config.schema import Config
from lrtrain.config.stored import check_stored_targets
from lrtrain.config.suggest import unknown_choice, unknown_key
from lrtrain.config.values import UnknownKey, validated
from lrtrain.errors import ConfigError


def typed(composed: DictConfig) -> Config:
    """The composed configuration with every interpolation resolved and every value validated.

    Raises:
        ConfigError: if a key is unknown or missing, or a value is wrong.
    """
    import_from_homes()
    try:
        plain = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True))
        config = validated(Config, plain)
        for section in CALLED_WITH:
            setattr(config, section, checked_choice(section, getattr(config, section)))
        for name, node in config.callbacks.items():
            config.callbacks[name] = checked_choice(f"callbacks.{name}", node)
    except OmegaConfBaseException as error:
        raise ConfigError(sentence(error)) from error
    except UnknownKey as error:
        raise ConfigError(unknown_key(error.key, composed)) from error
    if config.init_from is not None and config.data.tokenizer.path is None:
        config.data.tokenizer.path = tokenizer_of(config.init_from, Path(config.run.dir))
    return config


def tokenizer_of(init_from: str, run_dir: Path) -> str:
    """The path of the tokenizer of source weights: the run's own copy if it exists, else that of the weights (a run, a
    checkpoint or another model)."""
    weights = Path(init_from)
    copies = (run_dir / "tokenizer", weights / "tokenizer", weights.parent.parent / "tokenizer")
    return next((str(copy) for copy in copies if copy.is_dir()), init_from)


def sentence(error: OmegaConfBaseException) -> str:
    """The message for an OmegaConf error: the key and what is wrong with it, on one line."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; give one, as in {error.full_key}=…"
    reason = str(error.msg).splitlines()[0].strip()
    return f"{error.full_key}: {reason[0].lower()}{reason[1:]}"


def composition_sentence(error: Exception) -> str:
    """The message for an error of Hydra's composition, on one line."""
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return unknown_choice(group, name, error.options)
    if isinstance(cause, OmegaConfBaseException) and cause.full_key and "not in struct" in str(cause.msg):
        return unknown_key(cause.full_key, default_composition())
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def default_composition(*overrides: str, config_name: str = DEFAULT) -> DictConfig:
    """conf/pretrain.yaml, or another of the homes, with overrides, composed outside a Hydra job."""
    search_homes()
    instance = GlobalHydra.instance()
    job = instance.hydra  # of the Hydra job within which this may be called
    instance.clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            found = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
        add_homes_of(found.hydra.runtime.config_sources)
        with open_dict(found):
            del found["hydra"]
        return found
    finally:
        instance.hydra = job


def compose(*overrides: str, config_name: str = DEFAULT) -> Config:
    """The configuration of `launch/pretrain.py` with these overrides, for scripts and tests.

    Raises:
        ConfigError: see `typed`.
    """
    composed = default_composition(*overrides, config_name=config_name)
    if composed.run.name is None:
        composed.run.name = run_name(composed, list(overrides), config_name=config_name)
    return typed(composed)


def is_choice(group: str, name: str) -> bool:
    """Whether a configuration of this name is in the group's own folder, of lrtrain or of a home."""
    files = [folder / group / f"{name}.yaml" for folder in configurations()]
    return Path(name).name == name and any(file.is_file() for file in files)


def from_stored(
    plain: dict[str, Any], where: object, trusted: Collection[str] = (), folders: Sequence[str] = ()
) -> Config:
    """The configuration stored in a run's checkpoints; keys that were added later get their defaults.

    Args:
        where: the path it was read from, for the error.
        trusted: code that may run besides lrtrain's and that of homes: `_target_`s, and a model.path with code.
        folders: of configurations outside lrtrain that it was composed from, for the error.

    Raises:
        ConfigError: see `typed`; also if it names code that is not trusted.
    """
    check_stored_targets(plain, str(where), trusted, folders)
    path = plain["model"]["path"]
    if plain["model"]["trust_remote_code"] and path not in trusted:
        raise ConfigError(f"{where} was trained with code that model.path={path} brings; --trust {path} runs it")
    stored = OmegaConf.create(plain)
    ours = {group for group in CALLED_WITH if is_choice(group, str(stored[group].name))}
    for section, defaults in default_composition(*(f"{group}={stored[group].name}" for group in sorted(ours))).items():
        if section in CALLED_WITH.keys() - ours:
            continue  # a choice of a folder that this command does not name: used as stored
        if section not in stored:
            stored[section] = defaults
        elif isinstance(defaults, DictConfig):
            for key in defaults.keys() - stored[section].keys():
                stored[section][key] = defaults[key]
    return typed(stored)
