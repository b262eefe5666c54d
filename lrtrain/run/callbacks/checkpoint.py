"""Periodic checkpoints. A run is also saved every `checkpoint.minutes`, on a signal, and at its end."""

from typing import TYPE_CHECKING

from lrtrain.run.callbacks.base import Callback

if TYPE_CHECKING:
    from lrtrain.run.state import Run


class Checkpoint(Callback):
    """Starts a checkpoint every `every` steps."""

    def on_step(self, run: "Run") -> None:
        if run.progress.step:
            run.saver.save(run)
