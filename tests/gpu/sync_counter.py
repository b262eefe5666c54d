"""Counts how often the CPU waits for the GPU in the steps of a run."""

import warnings
from typing import Any

import torch

from lrtrain.run.callbacks.base import Callback
from lrtrain.run.state import Run

WARM = 5
"""Steps before those that are counted."""


class SyncCounter(Callback):
    """`syncs_per_step` in summary.json: torch's own warnings of synchronizing operations ÷ steps."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = self.steps = 0

    def before_step(self, run: Run) -> None:
        self.steps += run.progress.step >= WARM
        if self.steps == 1:
            warnings.simplefilter("always")
            warnings.showwarning = self._count
            torch.cuda.set_sync_debug_mode("warn")

    def _count(self, message: Warning | str, *_: Any) -> None:
        self.syncs += "synchroniz" in str(message)

    def on_end(self, run: Run) -> dict[str, Any]:
        torch.cuda.set_sync_debug_mode("default")
        return {"syncs_per_step": self.syncs / max(1, self.steps - 1)}
