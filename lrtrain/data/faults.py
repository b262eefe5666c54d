"""What could not be read of a corpus: counted, named, and left out or refused."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

from lrtrain.errors import ConfigError

log = logging.getLogger(__name__)

ON_ERROR = ("skip", "refuse")
NAMED = 10  # in the log; the others are only counted


@dataclass
class Faults:
    """Documents, or rests of files, that a corpus was read without.

    Args:
        refuse: whether the first one ends the run (`data.on_error=refuse`).
    """

    refuse: bool
    count: int = 0
    first: str = ""

    def add(self, file: object, row: int, reason: str) -> None:
        """Note that row `row`, counted from 1, could not be read, or all of `file` from there on.

        Raises:
            ConfigError: naming it, if these are refused.
        """
        where = f"{file}:{row}: {' '.join(reason.split())}"
        if self.refuse:
            raise ConfigError(_refusal(where))
        self.count += 1
        self.first = self.first or where
        if self.count <= NAMED:
            log.warning("left out: %s%s", where, "; more are only counted" if self.count == NAMED else "")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def known(found: dict[str, Any], refuse: bool) -> Faults:
    """The faults that were met when the corpus was read before.

    Raises:
        ConfigError: naming the first, if there are any and they are refused.
    """
    if found["count"] and refuse:
        raise ConfigError(_refusal(found["first"]))
    return Faults(refuse, found["count"], found["first"])


def _refusal(where: str) -> str:
    return f"data.on_error=refuse: {where}; mend or remove it, or leave such documents out with data.on_error=skip"
