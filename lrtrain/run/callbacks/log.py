"""Losses, learning rate, throughput and memory of the steps."""

import sys
from typing import TYPE_CHECKING, Any

from lrtrain.core.metrics import scalars
from lrtrain.distributed.collectives import max_over_ranks
from lrtrain.measure.evaluate import perplexity
from lrtrain.run.callbacks.base import Callback
from lrtrain.run.throughput import Meter, allocator_metrics, matmul_peak, peak_memory_gib

if TYPE_CHECKING:
    from lrtrain.run.state import Run
    from lrtrain.run.step import StepLog


class Log(Callback):
    """Logs `train/…` and `perf/…` after the first step, every `every` steps, and after the last.

    `train/loss` is the mean over the steps since the last row, without skipped ones.
    """

    def __init__(self, every: int):
        super().__init__(every)
        self.meter: Meter | None = None
        self.sums: dict[str, float] = {}
        """Sums of the losses since the last row, by name; `steps` is their number."""

    def before_step(self, run: "Run") -> None:
        if self.meter is None:
            self.meter = Meter(matmul_peak(run.world.device, run.engine.dtype) * run.world.size)

    def after_step(self, run: "Run", log: "StepLog") -> None:
        assert self.meter is not None
        progress = run.progress
        self.meter.add(log.seconds, log.waited, log.tokens)
        if log.skipped:
            self._tell_skipped(run)
        else:
            self._add(log)
        if not (self.due(progress.step) or progress.step in (1, run.config.train.steps)):
            return
        if not self.sums:  # every step since the last row was skipped
            self._add(log)
        steps = self.sums.pop("steps")
        losses = {name: value / steps for name, value in self.sums.items()}
        ppl = perplexity(losses.pop("cross_entropy"))
        memory = {"memory_gib": peak_memory_gib(run.world.device), **allocator_metrics(run.world.device)}
        run.log(
            scalars("train", losses | {"ppl": ppl, "grad_norm": log.grad_norm, "lr": log.lr})
            + scalars("perf", dict(zip(memory, max_over_ranks(*memory.values()), strict=True)))
            + scalars("optim", run.engine.optimizer.metrics())
            + self.meter.read(run.flops)
        )
        self.sums = {}

    def _add(self, log: "StepLog") -> None:
        found = {"steps": 1, "loss": log.loss, "cross_entropy": log.cross_entropy}
        if log.aux_loss is not None:
            found["aux_loss"] = log.aux_loss
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in found.items()}

    def _tell_skipped(self, run: "Run") -> None:
        step = run.progress.step
        if run.world.main:
            print(f"step {step} skipped: its loss or gradient is not finite", file=sys.stderr, flush=True)
        run.log(scalars("train", {"skipped": run.progress.skipped}))

    def state(self) -> dict[str, Any]:
        return dict(self.sums)

    def load_state(self, state: dict[str, Any]) -> None:
        self.sums = dict(state)
