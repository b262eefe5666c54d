"""Choices: configuration nodes that name a callable by `_target_` and are validated against its signature."""

import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, make_dataclass
from functools import partial
from inspect import Parameter
from typing import Any, get_args, get_type_hints

import hydra

from lrtrain.config.home import import_from_homes
from lrtrain.config.ranges import RankRule, Regex, RegexOrNull
from lrtrain.config.stored import KINDS
from lrtrain.config.values import STRICT, UnknownKey, validated
from lrtrain.errors import ConfigError

OF_THE_CHOICE = {"name", "_target_", "_partial_"}
OF_THE_MODEL = {"pattern": Regex, "rank": RankRule, "zero_init": RegexOrNull}
"""Keys of `param` that the model reads, not the layer, and their types."""
CALLED_WITH = {
    "param": {"in_features", "out_features", "bias", "rank", "device"},
    "optim": {"model"},
    "schedule": {"step", "steps"},
    "engine": {"world", "dtype", "compile", "recompute_every", "recompute_keep"},
}
"""Arguments that the code passes to the callables of a section; all others must be in the choice's yaml."""


def own_arguments(node: dict[str, Any]) -> dict[str, Any]:
    """The arguments in a `_target_` node for its callable."""
    others = OF_THE_CHOICE | (OF_THE_MODEL.keys() if "pattern" in node else set())
    return {key: value for key, value in node.items() if key not in others}


def checked_choice(section: str, node: dict[str, Any]) -> dict[str, Any]:
    """A `_target_` node with its values converted to the types in its callable's signature.

    A parameter without annotation takes any value, and a callable with `**more` any key.

    Raises:
        UnknownKey: if a key is not a parameter.
        ConfigError: if the callable cannot be imported, or a value is missing or not of the annotated type.
    """
    if section in CALLED_WITH:
        check_keys(section, node, ("name", "_target_"))
    if section == "param":
        node = node | checked({key: kind for key, kind in OF_THE_MODEL.items() if key in node}, node, section)
    if node.get("_target_") is None:
        return node
    if section == "param" and node.get("rank", 1) is None:
        raise ConfigError(f"param.rank=null is no rank, which param={node.get('name')} needs; give one, such as 128")
    target = find(section, node["_target_"])
    if section == "param":
        check_keys(section, node, ("pattern", "rank"))
    parameters, any_key = arguments(section, target)
    lacking = set() if any_key else CALLED_WITH.get(section, set()) - parameters.keys()
    check_callable(section, node["_target_"], target, lacking)
    given = own_arguments(node)
    for key in given:
        if key not in parameters and not any_key:
            raise UnknownKey(f"{section}.{key}")
    for key, parameter in inspect.signature(target).parameters.items():
        required = parameter.default is Parameter.empty and parameter.kind not in (
            Parameter.VAR_KEYWORD,
            Parameter.VAR_POSITIONAL,
        )
        if required and key not in given and key not in CALLED_WITH.get(section, set()):
            raise ConfigError(
                f"{section}.{key} has no value: {node['_target_']} needs one, and the yaml of "
                f"{section}={node.get('name')} has none"
            )
    return node | checked({key: parameters.get(key, Any) for key in given}, given, section)


def check_keys(section: str, node: dict[str, Any], keys: Sequence[str]) -> None:
    """Raise ConfigError if a choice lacks one of the keys that all choices of its section have."""
    for key in keys:
        if key not in node:
            raise ConfigError(f"{section}.{key} has no value: the yaml of {section}={node.get('name')} has to give one")


def check_callable(section: str, path: str, target: Any, lacking: set[str]) -> None:
    """Raise ConfigError if the class that a choice names has another base class than its section's, lacks a method, or
    has a constructor that does not take the arguments `lacking`, which the code gives."""
    kind = KINDS.get(section, ("", None))[1]
    if inspect.isclass(target) and kind and not issubclass(target, pkgutil.resolve_name(kind)):
        hint = "; optim=torch optim.of=CLASS takes any of torch.optim" if section == "optim" else ""
        raise ConfigError(f"{section}._target_={path} is not a subclass of {kind}{hint}")
    if inspect.isabstract(target):
        methods = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
        raise ConfigError(f"{section}._target_={path} cannot be made: it lacks {methods}")
    if lacking:
        raise ConfigError(f"{section}._target_={path} takes no {min(lacking)}, which lrtrain gives to every {section}")


def checked(types: dict[str, Any], values: dict[str, Any], section: str) -> dict[str, Any]:
    """The values of the keys of `types`, converted to these. Raises ConfigError for one that is not of its type."""
    schema = make_dataclass("Choice", types.items(), namespace={"__pydantic_config__": STRICT})
    return asdict(validated(schema, {key: values[key] for key in types}, section))


def find(section: str, path: str) -> Any:
    """The object at a dotted path.

    Raises:
        ConfigError: if it cannot be imported.
    """
    import_from_homes()
    try:
        return pkgutil.resolve_name(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{section}._target_={path} cannot be imported: there is no module {error.name}; --config-dir=FOLDER names "
            f"the folder of your own configurations and modules"
        ) from error
    except Exception as error:  # importing a module may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{section}._target_={path} cannot be imported: {reason}") from error


def arguments(section: str, target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """The keyword arguments of a callable with their annotations, and whether it accepts any other key.

    `**settings: Unpack[SomeTypedDict]` is expanded.

    Raises:
        ConfigError: if an annotation names a type that its module does not have.
    """
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except NameError as error:
        name = getattr(target, "__qualname__", target)
        raise ConfigError(f"{section}: an annotation of {name} cannot be resolved: {error}") from error
    found, any_key = {}, False
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is not Parameter.VAR_KEYWORD:
            found[name] = hints.get(name, Any)
        elif unpacked := get_args(hints.get(name)):
            found |= get_type_hints(unpacked[0], include_extras=True)
        else:
            any_key = True
    return found, any_key


def choice(node: dict[str, Any]) -> Callable[..., Any]:
    """The callable that a `_target_` node names, with the node's values bound."""
    return partial(hydra.utils.get_object(node["_target_"]), **own_arguments(node))
