"""Restricting the code that a configuration from a model folder or checkpoint may run to lrtrain's classes."""

import argparse
import inspect
from collections.abc import Collection, Iterator
from typing import Any

import hydra

from lrtrain.errors import ConfigError

KINDS = {
    "param": ("lrtrain.layers", "lrtrain.layers.base.FactorizedLinear"),
    "optim": ("lrtrain.optim", "lrtrain.optim.base.ShardedOptimizer"),
    "engine": ("lrtrain.engine", "lrtrain.engine.base.Engine"),
    "schedule": ("lrtrain.optim.schedules", None),
    "data.source": ("lrtrain.data.sources", None),
    "callbacks": ("lrtrain.run.callbacks", None),
}
"""Section → package and base class of the `_target_`s allowed there in a stored configuration."""


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option `--trust` to a script: the user's code that it may run."""
    told = "your own _target_s, or model.path, that may run"
    parser.add_argument("--trust", nargs="+", default=[], metavar="NAME", help=told)


def check_stored_targets(stored: dict[str, Any], where: str, trusted: Collection[str]) -> None:
    """Check that a configuration from a model folder or checkpoint names only classes of lrtrain.

    Args:
        where: the path it was read from, for the error.
        trusted: other `_target_`s, named by the user.

    Raises:
        ConfigError: if a `_target_` is neither.
    """
    for section, target in stored_targets(stored):
        if target is not None and target not in trusted and not belongs(section, str(target)):
            raise ConfigError(
                f"{where} names {section}._target_={target}, which is no class of lrtrain for this; it is run only "
                f"where the command itself names it: --trust {target}, or in the configuration of a run"
            )


def stored_targets(node: Any, section: str = "") -> Iterator[tuple[str, Any]]:
    """(section, `_target_`) of every node in a configuration."""
    if isinstance(node, dict) and "_target_" in node:
        yield section, node["_target_"]
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from stored_targets(child, f"{section}.{key}".lstrip("."))


def belongs(section: str, target: str) -> bool:
    """Whether a `_target_` is defined (not only imported) in the package of its section and has its base class."""
    room, kind = KINDS.get("callbacks" if section.startswith("callbacks.") else section, ("", None))
    if not room or not target.startswith(f"{room}."):
        return False
    try:
        found = hydra.utils.get_object(target)
    except Exception:  # importing an unknown name may raise anything
        return False
    defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}" == target
    return defined and (kind is None or (inspect.isclass(found) and issubclass(found, hydra.utils.get_class(kind))))
