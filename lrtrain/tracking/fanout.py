"""Several sinks behind one tracker: a failing sink stops neither training nor other sinks."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lrtrain.core.metrics import Metric
from lrtrain.tracking.base import Tracker, Value

FAILURES_ALLOWED = 3


class FanOut(Tracker):
    """Forwards every call to each sink; a sink that failed three times only gets `finish`."""

    def __init__(self, sinks: Mapping[str, Tracker]):
        self._sinks = sinks
        self._failures: Counter[str] = Counter()

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        self._each(lambda sink: sink.log(step, tokens, metrics))

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray]) -> None:
        self._each(lambda sink: sink.log_spectra(step, spectra))

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._each(lambda sink: sink.log_image(step, name, path))

    def sync(self) -> None:
        self._each(lambda sink: sink.sync())

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        for name, sink in self._sinks.items():
            self._try(name, sink, lambda sink: sink.finish(summary, exit_code))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, sink in self._sinks.items():
            if self._failures[name] < FAILURES_ALLOWED:
                self._try(name, sink, call)

    def _try(self, name: str, sink: Tracker, call: Callable[[Tracker], None]) -> None:
        try:
            call(sink)
        except Exception as error:
            self._failures[name] += 1
            if self._failures[name] == 1:
                told = f"tracking: {name} failed with {error!r}; after {FAILURES_ALLOWED} failures it is switched off"
                print(told, file=sys.stderr, flush=True)
