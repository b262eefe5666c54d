"""The validation loss, and at the end also the loss at smaller ranks of layers that support them."""

import time
from typing import TYPE_CHECKING, Any

from lrtrain.core.metrics import scalars
from lrtrain.measure.evaluate import perplexity
from lrtrain.measure.truncation import evaluate_truncated
from lrtrain.run.callbacks.base import Callback

if TYPE_CHECKING:
    from lrtrain.run.state import Run


class Evaluate(Callback):
    """Logs `eval/…`."""

    def on_start(self, run: "Run") -> None:
        if run.progress.step:
            super().on_start(run)
        elif run.config.init_from and run.config.train.steps:  # a model that was drawn has nothing to show
            self._evaluate(run)

    def on_step(self, run: "Run") -> None:
        self._evaluate(run)

    def on_end(self, run: "Run") -> dict[str, Any]:
        found = self._evaluate(run)
        if found is None:
            return {}
        truncations = evaluate_truncated(run.engine.model, run.counts["parameters"], run.held_out_loss)
        if truncations:
            run.log([metric for truncation in truncations for metric in truncation.metrics()])
        return {
            "eval_loss": found,
            "eval_perplexity": perplexity(found),
            **{f"parameters_at_rank_share_{t.share:g}": t.parameters for t in truncations},
            **{f"eval_loss_at_rank_share_{t.share:g}": t.loss for t in truncations},
        }

    def _evaluate(self, run: "Run") -> float | None:
        """The validation loss; None if there is no validation set, or a signal interrupted the evaluation."""
        started = time.perf_counter()
        found = run.held_out_loss()
        if found is None:
            return None
        seconds = time.perf_counter() - started
        run.log(found.metrics(run.config.eval.compat) + scalars("perf", {"eval_seconds": seconds}))
        return found.loss
