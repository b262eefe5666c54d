"""Restricting the code that a configuration from a model folder or checkpoint may run: to classes of lrtrain, and of
the homes that the command names."""

import argparse
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import hydra

from lrtrain.config.home import add_config_dir, file_in_a_home, import_from_homes, in_a_home
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
    """Add the options to a script that name the user's code that it may run."""
    told = "your own _target_s, or model.path, that may run"
    parser.add_argument("--trust", nargs="+", default=[], metavar="NAME", help=told)
    add_config_dir(parser)


def check_stored_targets(
    stored: dict[str, Any], where: str, trusted: Collection[str], folders: Sequence[str] = ()
) -> None:
    """Check that a configuration from a model folder or checkpoint names only classes of lrtrain and of homes.

    Args:
        where: the path it was read from, for the error.
        trusted: other `_target_`s, named by the user.
        folders: of configurations outside lrtrain that it was composed from, for the error.

    Raises:
        ConfigError: if a `_target_` is neither.
    """
    for section, target in stored_targets(stored):
        if target is not None and target not in trusted and not belongs(section, str(target)):
            folder = folders[0] if folders else "FOLDER"
            raise ConfigError(
                f"{where} names {section}._target_={target}, which is no class of lrtrain for this; it is run only "
                f"where the command names its folder, --config-dir={folder}, or itself: --trust "
                f"{target}, or in the configuration of a run"
            )


def stored_targets(node: Any, section: str = "") -> Iterator[tuple[str, Any]]:
    """(section, `_target_`) of every node in a configuration."""
    if isinstance(node, dict) and "_target_" in node:
        yield section, node["_target_"]
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from stored_targets(child, f"{section}.{key}".lstrip("."))


def belongs(section: str, target: str) -> bool:
    """Whether a `_target_` is defined (not only imported) in the package of its section, or in a home, and has its base
    class."""
    room, kind = KINDS.get("callbacks" if section.startswith("callbacks.") else section, ("", None))
    outside = in_a_home(target)
    if not room or not (outside or target.startswith(f"{room}.")):
        return False
    import_from_homes()
    try:
        found = hydra.utils.get_object(target)
    except Exception:  # importing an unknown name may raise anything
        return False
    defined = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}" == target
    if outside and file_in_a_home(getattr(found, "__module__", "")) is None:
        return False
    return defined and (kind is None or (inspect.isclass(found) and issubclass(found, hydra.utils.get_class(kind))))
