"""Spectra of weights, hidden states, updates and gradients, configured in `conf/spectra`."""

import time
from typing import TYPE_CHECKING, Any

from lrtrain.core.metrics import Metric, scalars, spelled
from lrtrain.measure.monitor import Monitor
from lrtrain.run.callbacks.base import Callback

if TYPE_CHECKING:
    from lrtrain.run.state import Run
    from lrtrain.run.step import StepLog


class Spectra(Callback):
    """Logs `spectra/…`, `hidden/…`, `updates/…` and, in the first and last step too, `gradients/…`."""

    def __init__(self, every: int):
        super().__init__(every)
        self.monitor: Monitor | None = None
        self.gradients: list[Metric] = []
        self.seconds = 0.0
        """Total seconds of measurements so far."""

    def after_backward(self, run: "Run") -> None:
        step = run.progress.step + 1
        if not self.every or not (self.due(step) or step in (1, run.config.train.steps)):
            return
        started = time.perf_counter()
        self.gradients = self._monitor(run).measure_gradients()
        self.seconds += time.perf_counter() - started

    def after_step(self, run: "Run", log: "StepLog") -> None:
        if self.gradients:
            run.log(self.gradients)
        self.gradients = []

    def on_step(self, run: "Run") -> None:
        self._measure(run)

    def on_end(self, run: "Run") -> dict[str, Any]:
        if not self.every:
            return {}
        return {"effective_rank": spelled(self._measure(run)).get("spectra/summary/all/erank_mean")}

    def state(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        self.seconds = state.get("seconds", 0.0)

    def _measure(self, run: "Run") -> list[Metric]:
        started = time.perf_counter()
        metrics, arrays = self._monitor(run).measure()
        seconds = time.perf_counter() - started
        self.seconds += seconds
        cost = {"spectra_seconds": seconds}
        if run.progress.seconds:
            cost["spectra_pct"] = 100 * self.seconds / (run.progress.seconds + self.seconds)
        run.log(metrics + scalars("perf", cost))
        if arrays:
            run.tracker.log_spectra(run.progress.step, {name: values.numpy() for name, values in arrays.items()})
        return metrics

    def _monitor(self, run: "Run") -> Monitor:
        if self.monitor is None:
            self.monitor = Monitor(run.config, run.engine, run.data, run.world)
        return self.monitor
