"""A trace of one step."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

from lrtrain.run.callbacks.base import Callback
from lrtrain.run.profiling import profiled

if TYPE_CHECKING:
    from lrtrain.run.state import Run
    from lrtrain.run.step import StepLog


class Profile(Callback):
    """Writes a trace of `step` on the main process to profile/ in the run directory; None: no step."""

    def __init__(self, step: int | None = None):
        super().__init__()
        self.step = step
        self.tracing = ExitStack()

    def before_step(self, run: "Run") -> None:
        if run.world.main and run.progress.step + 1 == self.step:
            self.tracing.enter_context(profiled(run.dir / "profile"))

    def after_step(self, run: "Run", log: "StepLog") -> None:
        self.tracing.close()
