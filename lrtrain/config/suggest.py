"""Messages for unknown keys and choices, with suggestions."""

import difflib
from collections.abc import Iterable, Iterator

from omegaconf import DictConfig, OmegaConf

from lrtrain.config.home import configurations

OF_THE_MACHINERY = ("_target_", "_partial_", "model.recipe.")


def unknown_key(key: str, composed: DictConfig) -> str:
    """`train.stps is not a key of the configuration; did you mean train.steps?`"""
    group, _, inner = key.partition(".")
    if owners := choices_with(group, inner):
        return f"{key} is not a key of the {group} that is chosen; it belongs to {', '.join(owners)}"
    others = [k for k in keys(composed) if k != key and not any(part in k for part in OF_THE_MACHINERY)]
    near = nearest_key(key, others)
    return f"{key} is not a key of the configuration" + (f"; did you mean {near}?" if near else "")


def unknown_choice(group: str, name: str, options: Iterable[str]) -> str:
    """`param=sltran is not one of cola, …; did you mean sltrain?`"""
    names = sorted(options)
    near = difflib.get_close_matches(name, names, n=1)
    more = f"did you mean {near[0]}?" if near else "--config-dir=FOLDER names a folder of your own"
    return f"{group}={name} is not one of {', '.join(names)}; {more}"


def choices_with(group: str, key: str) -> list[str]:
    """The choices of a group whose file has a key, such as `engine=deepspeed`."""
    files = sorted(file for folder in configurations() for file in (folder / group).glob("*.yaml")) if key else []
    return [f"{group}={file.stem}" for file in files if key in OmegaConf.load(file)]


def nearest_key(key: str, known: list[str]) -> str | None:
    """The key nearest to an unknown one: in the same section, or else by its last part in any section."""
    section, _, last = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == section] if section else []
    by_last = {k.rpartition(".")[2]: k for k in reversed(siblings or known)}
    near = [k for k in (last, *by_last) if k in by_last and k.startswith(last)] or difflib.get_close_matches(
        last, by_last, n=1
    )
    return by_last[near[0]] if near else None


def keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys below a node."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from keys(child, f"{prefix}{key}.")
