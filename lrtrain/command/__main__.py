"""The console command `lrtrain`: each of its subcommands is a module of this package with a function `add_to`."""

import argparse
import sys

from lrtrain.command import init
from lrtrain.core.streams import never_fail_to_print
from lrtrain.errors import ConfigError


def main() -> None:
    """Run a subcommand."""
    never_fail_to_print()
    parser = argparse.ArgumentParser("lrtrain", description="Pretrain low-rank language models.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (init,):
        command.add_to(commands)
    args = parser.parse_args()
    try:
        args.run(args)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
