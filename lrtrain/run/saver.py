"""When a run is saved, and what its checkpoints hold."""

from __future__ import annotations

import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lrtrain.checkpoint.checkpointer import Checkpointer
from lrtrain.checkpoint.meta import CheckpointMeta, DataState
from lrtrain.config.home import home_record
from lrtrain.config.schema import as_dict
from lrtrain.core.metrics import scalars
from lrtrain.distributed.collectives import max_over_ranks
from lrtrain.distributed.sharding import local
from lrtrain.errors import ConfigError

if TYPE_CHECKING:
    from lrtrain.run.state import Run


class Saver:
    """Saves a run, and loads it. All methods are collectives.

    Args:
        saved: the step of the checkpoint that this run resumes from, which is not saved again; else −1.
    """

    def __init__(self, run: Run, saved: int = -1):
        checkpoint = run.config.checkpoint
        folder = run.dir / "checkpoints"
        self.checkpointer = Checkpointer(
            folder, run.world, checkpoint.keep, checkpoint.keep_every, checkpoint.asynchronous
        )
        self.step = saved
        self.last = time.monotonic()
        self.clock = run.world.main
        self.minutes = checkpoint.minutes

    def overdue(self) -> bool:
        """Whether a checkpoint is due by the main process's clock."""
        return self.clock and time.monotonic() - self.last > 60 * self.minutes

    def save(self, run: Run, final: bool = False) -> None:
        """Start a checkpoint of this step, unless it has one or a value is not finite.

        While steps are skipped only a `final` checkpoint is written: good checkpoints must not be deleted in favour of
        those of a model that may never give a finite loss again.
        """
        if self.step == run.progress.step:
            self.checkpointer.wait()
            if self.checkpointer.saved:
                return
        self.last = time.monotonic()
        if run.progress.skipped_in_a_row and not final:
            return
        state = run.engine.state_dict()
        if bad := nonfinite(state):
            return self._refuse(run, f"{bad} is not finite")
        started = time.perf_counter()
        run.tracker.sync()
        self.checkpointer.save(state, run.progress.step, meta_of(run))
        self.step = run.progress.step
        run.log(scalars("perf", {"checkpoint_seconds": time.perf_counter() - started}))

    def _refuse(self, run: Run, reason: str) -> None:
        self.checkpointer.wait()
        self.checkpointer.saved = False
        if run.world.main:
            print(f"step {run.progress.step} is not saved: {reason}", file=sys.stderr, flush=True)

    def load(self, run: Run, checkpoint: Path, meta: CheckpointMeta) -> None:
        """Load a checkpoint, and its position in the data if the data is the same.

        Raises:
            ConfigError: if the seed gives other sparse supports than the checkpoint was trained with.
        """
        state = run.engine.state_dict()
        self.checkpointer.load(state, checkpoint)
        run.engine.load_state_dict(state)
        if meta.support_hash != run.support_hash:
            raise ConfigError(f"{checkpoint} was trained with other sparse supports than train.seed gives here")
        if meta.data.fingerprint == run.data.fingerprint:
            run.progress = meta.progress
            run.data.train.load_state(meta.data.state)
            for name, callback in run.callbacks.items():
                callback.load_state(meta.callbacks.get(name, {}))
        if run.world.main:
            there, here = meta.config["engine"]["name"], run.config.engine["name"]
            moved = f", saved by engine={there} and loaded by engine={here}" if there != here else ""
            step, steps = run.progress.step, run.config.train.steps
            ended = f"; train.steps={steps} leaves no step to take" if step >= steps else ""
            print(f"going on from {checkpoint} at step {step}{moved}{ended}", flush=True)


def meta_of(run: Run) -> CheckpointMeta:
    """The `CheckpointMeta` of the run's current step."""
    return CheckpointMeta(
        step=run.progress.step,
        progress=run.progress,
        data=DataState(run.data.fingerprint, run.data.train.state(run.progress.position)),
        config=as_dict(run.config),
        support_hash=run.support_hash,
        executed=run.identity.executed,
        versions={name: version(name) for name in ("torch", "transformers", "datasets")},
        world_size=run.world.size,
        executions=run.identity.executions,
        ranks=dict(run.rank_plan.exact),
        architecture=run.engine.model.config.to_dict(),
        run_id=run.identity.id,
        callbacks={name: state for name, callback in run.callbacks.items() if (state := callback.state())},
        home=home_record(),
    )


def nonfinite(state: dict[str, Any]) -> str | None:
    """The name of a tensor of model or optimizer with a NaN or infinite entry on any process; None if there is none. A
    collective."""
    named = [(f"{part} {name}", local(t)) for part, values in state.items() for name, t in values.items()]
    checked = [i for i, (_, t) in enumerate(named) if t.is_floating_point() and t.numel()]
    largest = torch._foreach_norm([named[i][1] for i in checked], float("inf"))
    bad = [i for i, entry in zip(checked, largest, strict=True) if not math.isfinite(entry.item())]
    (last,) = max_over_ranks(float(bad[-1] if bad else -1))
    return named[int(last)][0] if last >= 0 else None
