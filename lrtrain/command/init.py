"""`lrtrain init DIR`: a folder for methods, callbacks and configurations of one's own."""

import shutil
from pathlib import Path
from typing import Any

from lrtrain.errors import ConfigError

HOME = Path(__file__).resolve().parent / "home"


def add_to(commands: Any) -> None:
    """Add this subcommand to argparse's subparsers."""
    told = "make a folder with a method, a callback, their configuration and a test, to begin from"
    parser = commands.add_parser("init", help=told, description=f"Make a folder: {told.partition(' with ')[2]}.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to make")
    parser.set_defaults(run=lambda args: print(init(args.folder)))


def init(folder: Path) -> str:
    """Lay down a home in a folder that is new or empty; returns what to do next.

    Raises:
        ConfigError: if it is neither.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists; give a new folder")
    shutil.copytree(HOME, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return f"{folder} is a home for your own methods; {folder / 'README.md'} says how to train with them"
