"""The interface of callbacks."""

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from lrtrain.run.state import Run
    from lrtrain.run.step import StepLog


class Callback:
    """Work between steps, such as a measurement. Subclass it and override the hooks you need.

    Every process calls every hook at the same step, so a hook may use collectives. Only the main process should write
    files; all processes may call `run.log`, which records on the main process.

    Args:
        every: call `on_step` when the number of completed steps is a multiple of this; 0: never.
    """

    needs_gradients: ClassVar[bool] = False
    """Whether `after_backward` reads whole gradients, which `optim.in_backward=true` never has."""

    def __init__(self, every: int = 0):
        self.every = every

    def due(self, step: int) -> bool:
        """Whether `on_step` is called after `step` steps."""
        return self.every > 0 and step % self.every == 0

    def on_start(self, run: "Run") -> None:
        """Called before the first step of a new or resumed run. By default calls `on_step` if it is due: a resumed run
        repeats what was due at its checkpoint's step, since it may not have been done. Without a step left, `on_end`
        does it."""
        if self.due(run.progress.step) and run.progress.step < run.config.train.steps:
            self.on_step(run)

    def before_step(self, run: "Run") -> None:
        """Called before the first forward pass of a step, after `run.progress.step` completed steps."""

    def after_backward(self, run: "Run") -> None:
        """Called when the gradients of a step are fully reduced, before clipping."""

    def after_step(self, run: "Run", log: "StepLog") -> None:
        """Called after each optimizer step."""

    def on_step(self, run: "Run") -> None:
        """Every `every` steps."""

    def on_end(self, run: "Run") -> dict[str, Any]:
        """Called after the last step, while its checkpoint is being written; returns values for summary.json. By
        default calls `on_step` if it is due."""
        if self.due(run.progress.step):
            self.on_step(run)
        return {}

    def state(self) -> dict[str, Any]:
        """The state to store in checkpoints, in plain containers."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load what `state` returned."""
