"""The contract of a callback."""

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from lrtrain.run.state import Run
    from lrtrain.run.step import StepLog


class Callback:
    """Something that a run does beside its steps, such as a measurement. Subclass it and override what you need.

    Every process calls every hook at the same step, so a hook may run collectives. Only the main process writes files;
    `run.log` may be called by all, and records on the main process.

    Args:
        every: call `on_step` when the number of done steps is a multiple of this; 0: never.
    """

    needs_gradients: ClassVar[bool] = False
    """Whether `after_backward` reads whole gradients, which `optim.in_backward=true` never has."""

    def __init__(self, every: int = 0):
        self.every = every

    def due(self, step: int) -> bool:
        """Whether `on_step` is called when `step` steps are done."""
        return self.every > 0 and step % self.every == 0

    def on_start(self, run: "Run") -> None:
        """Before the first step of a run that starts (at step 0) or resumes. By default `on_step`, if it is due: a
        resumed run makes up for what was due at its checkpoint's step but may not have been done."""
        if self.due(run.progress.step):
            self.on_step(run)

    def before_step(self, run: "Run") -> None:
        """Before the first forward pass of a step; `run.progress.step` steps are done."""

    def after_backward(self, run: "Run") -> None:
        """When the gradients of a step are whole, before they are clipped."""

    def after_step(self, run: "Run", log: "StepLog") -> None:
        """After each optimizer step."""

    def on_step(self, run: "Run") -> None:
        """Every `every` steps."""

    def on_end(self, run: "Run") -> dict[str, Any]:
        """After the last step, when its checkpoint is being written; returns values for summary.json. By default
        `on_step`, if it is due."""
        if self.due(run.progress.step):
            self.on_step(run)
        return {}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of this callback, in plain containers: it is kept in each checkpoint."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
