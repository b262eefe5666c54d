"""Homes: folders outside lrtrain with configurations and the modules that these name.

A home's configurations are in its folder `conf/`, or in itself if it has none; its modules are imported from it. Only
a command names homes, by `--config-dir`, `hydra.searchpath` or LRTRAIN_CONF: nothing that is read from a run or model
does.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from hydra.conf import ConfigSourceInfo
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

import lrtrain
from lrtrain.config.naming import DEFAULT
from lrtrain.errors import ConfigError

VARIABLE = "LRTRAIN_CONF"  # environment variable: homes, separated as in PATH; what the command names is added to it
CONF = Path(lrtrain.__file__).resolve().parent / "conf"  # in a clone a link to conf/


def homes() -> list[Path]:
    """The homes of this process.

    Raises:
        ConfigError: if one does not exist.
    """
    found = [home_of(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    for home in found:
        if not home.is_dir():
            raise ConfigError(f"{VARIABLE} names {home}, which is no folder; give folders separated by {os.pathsep!r}")
    return found


def home_of(folder: str | Path) -> Path:
    """The home of a folder of configurations: of a folder named `conf` its parent, else the folder itself."""
    path = Path(os.path.abspath(Path(folder).expanduser()))
    return path.parent if path.name == "conf" else path


def add_homes(folders: Iterable[str | Path]) -> None:
    """Name more homes, for this process and those that it starts."""
    known = [*map(str, homes()), *(str(home_of(folder)) for folder in folders)]
    if known:
        os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys(known))
    import_from_homes()


def import_from_homes() -> None:
    """Let the homes' modules be imported: after Python's own and installed ones, which they cannot replace."""
    sys.path += [str(home) for home in homes() if str(home) not in sys.path]


# --- configurations --------------------------------------------------------------------------------------------------


def configurations() -> list[Path]:
    """The folders of configurations: lrtrain's own, and those of the homes."""
    return [CONF, *(home / "conf" if (home / "conf").is_dir() else home for home in homes())]


class HomeSearchPath(SearchPathPlugin):
    """Makes Hydra search the homes, after lrtrain's own configurations."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in configurations()[1:]:
            search_path.append(VARIABLE, f"file://{folder}")


def search_homes() -> None:
    """Make Hydra search the homes in all compositions of this process."""
    Plugins.instance().register(HomeSearchPath)


def add_homes_of(sources: Iterable[ConfigSourceInfo]) -> None:
    """Name the folders as homes from which Hydra has composed a configuration.

    Args:
        sources: its hydra.runtime.config_sources.
    """
    files = [source.path for source in sources if source.schema == "file"]
    add_homes(path for path in files if Path(path).resolve() != CONF.resolve())


class NamesHome(argparse.Action):
    """The option `--config-dir` of a script."""

    def __call__(self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option: Any = None) -> None:
        add_homes([str(values)])


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Add the option `--config-dir` to a script: a folder of configurations and modules of the user's own."""
    told = f"a folder with your own configurations and code (more in {VARIABLE})"
    parser.add_argument("--config-dir", "-cd", action=NamesHome, metavar="DIR", help=told)


def config_name_of(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the configuration among the arguments of a script, and those that are overrides; names the homes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-name", "-cn", default=DEFAULT)
    add_config_dir(parser)
    options, overrides = parser.parse_known_args(arguments)
    return options.config_name, overrides


# --- modules ---------------------------------------------------------------------------------------------------------


@dataclass
class HomeRecord:
    """What a run has from homes, as run.json and checkpoints keep it."""

    folders: list[str] = field(default_factory=list)
    """Of configurations."""
    import_path: list[str] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    """Module → hash of its file, of all that were imported."""


def home_record() -> HomeRecord:
    """The homes of this process, and their modules that have been imported so far."""
    return HomeRecord(
        folders=[str(folder) for folder in configurations()[1:]],
        import_path=[str(home) for home in homes()],
        modules={name: digest(path) for name in sorted(sys.modules) if (path := file_in_a_home(name))},
    )


def in_a_home(target: str) -> bool:
    """Whether a dotted path begins with a module of a home; imports nothing."""
    parts = target.split(".")
    names = [".".join(parts[:k]) for k in range(1, len(parts))]
    return any(path.is_file() for name in names for home in homes() for path in places(home, name))


def file_in_a_home(module: str) -> Path | None:
    """The file of an imported module if it is one of a home's; else None."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not file or module.partition(".")[0] == "lrtrain":
        return None
    return next((Path(file) for home in homes() if Path(file) in places(home, module)), None)


def places(home: Path, module: str) -> tuple[Path, Path]:
    """The files in a home from which a module may be imported."""
    path = home.joinpath(*module.split("."))
    return path.with_name(f"{path.name}.py"), path / "__init__.py"


@cache  # a file that is edited while a run lasts does not change what was imported
def digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
