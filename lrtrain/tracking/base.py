"""The interface of sinks for a run's metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lrtrain.core.metrics import Metric

Value = float | int | str


class Tracker:
    """Records nothing; used by all processes except the main one. Sinks override the methods they support."""

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        """Log scalars after `step` optimizer steps and `tokens` tokens on all processes."""

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray]) -> None:
        """Log singular values by layer name, each 1-D and descending; `<layer>/<name>` are other arrays of the same
        length, such as contributions of a layer's parts."""

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Log the picture at `path`."""

    def sync(self) -> None:
        """Sync what was logged to disk, so that it survives a power cut; called before each checkpoint."""

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        """Finish the run; `exit_code` is 0 if it succeeded."""
