"""Choices: configuration nodes that name a callable by `_target_` and are checked against its signature."""

import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from functools import partial
from typing import Any, get_args, get_type_hints

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lrtrain.errors import ConfigError


def unknown_key(key: str, composed: DictConfig) -> str:
    """`train.stps is not a key; did you mean train.steps?`"""
    near = difflib.get_close_matches(key, [k for k in keys(composed) if k != key], n=1, cutoff=0.5)
    return f"{key} is not a key of the configuration" + (f"; did you mean {near[0]}?" if near else "")


def keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys below a node."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from keys(child, f"{prefix}{key}.")


OF_THE_CHOICE = {"name", "_target_", "_partial_"}


OF_THE_MODEL = {"pattern", "rank", "zero_init"}  # of `param`: which layers, and what each is given


def own_arguments(node: dict[str, Any]) -> dict[str, Any]:
    """What a `_target_` node says to the callable that it names."""
    others = OF_THE_CHOICE | (OF_THE_MODEL if "pattern" in node else set())
    return {key: value for key, value in node.items() if key not in others}


def check_choice(section: str, node: dict[str, Any], composed: DictConfig) -> None:
    """Check a `_target_` node against the signature of what it names.

    Raises:
        ConfigError: for a key that is no parameter of it, or a value that is not of the annotated type.
    """
    if node.get("_target_") is None:
        return
    parameters = arguments(hydra.utils.get_object(node["_target_"]))
    given = own_arguments(node)
    for key in given:
        if key not in parameters:
            raise ConfigError(unknown_key(f"{section}.{key}", composed) + f" of {section}={node['name']}")
    schema = make_dataclass(section, [(key, parameters[key]) for key in given])
    try:
        OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        reason = str(error.msg).splitlines()[0]
        raise ConfigError(f"{section}.{error.full_key}={given.get(str(error.full_key))}: {reason}") from error


def arguments(target: Callable[..., Any]) -> dict[str, Any]:
    """What can be passed to a callable by name, with its annotation; `**settings: Unpack[SomeTypedDict]` is seen
    through."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= get_type_hints(get_args(parameter.annotation)[0])
        else:
            found[name] = parameter.annotation
    return found


def choice(node: dict[str, Any]) -> Callable[..., Any]:
    """The callable that a `_target_` node names, with the node's values bound."""
    return partial(hydra.utils.get_object(node["_target_"]), **own_arguments(node))
