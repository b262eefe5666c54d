"""The one interface through which a run tells the outside what it measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lrtrain.core.metrics import Metric

Value = float | int | str


class Tracker:
    """Records nothing: what every process but the main one has. Sinks override what they can show."""

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        """Scalars at `step` completed optimizer updates and `tokens` tokens seen by all processes together."""

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray]) -> None:
        """Singular values by layer name, each 1-D and descending; by `<layer>/<name>` other arrays of that length, as
        what the parts of a layer contribute to them."""

    def log_image(self, step: int, name: str, path: Path) -> None:
        """A picture that was written to `path`."""

    def sync(self) -> None:
        """Put what was logged on the disk, where a power cut leaves it: called with each checkpoint."""

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        """The run is over; `exit_code` is 0 if it went well."""
