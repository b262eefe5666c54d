"""The training loop. It knows no method by name: the configuration selects model, optimizer, engine and callbacks."""

import dataclasses
import gc
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lrtrain import distributed
from lrtrain.checkpoint.checkpointer import last_good
from lrtrain.checkpoint.meta import Window
from lrtrain.config.naming import fingerprint
from lrtrain.config.schema import Config
from lrtrain.core.restart import note_finished, note_unfinished
from lrtrain.distributed.collectives import check_equal_on_all_ranks
from lrtrain.distributed.heartbeat import Heartbeat
from lrtrain.distributed.world import AFTER_STEP_1, World, limit_nccl
from lrtrain.errors import RunFailed
from lrtrain.model.kernels import attention_kernels
from lrtrain.run.determinism import deterministic_algorithms
from lrtrain.run.lock import RunLock
from lrtrain.run.profiling import snapshot_when_out_of_memory
from lrtrain.run.rollback import Spike, watch
from lrtrain.run.start import COLLECTIVES, start_run
from lrtrain.run.state import Run
from lrtrain.run.step import take_step
from lrtrain.run.stop import StopRequest
from lrtrain.run.summary import summarize


def pretrain(config: Config) -> dict[str, Any]:
    """Join the process group, `train` until a signal or the end, and leave the group; returns what `train` does."""
    with deterministic_algorithms(config.train.deterministic):
        world = distributed.start(
            config.optim["in_backward"], config.train.timeout_minutes, Path(config.run.dir) / COLLECTIVES
        )
        stop = StopRequest()
        try:
            with attention_kernels(world.device):
                return train(config, world, stop)
        finally:
            stop.restore()
            distributed.stop()


def train(config: Config, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train as configured, from the start or resumed; a collective.

    Returns:
        The content of summary.json; or `stopped_by` and `step` if a signal stopped the run.

    Raises:
        ConfigError: on every process, if a value of the configuration is wrong.
        Diverged: after `train.max_skipped` steps in a row without a finite loss and gradient.
        RunFailed: if the last checkpoint could not be saved.
    """
    left_out: list[Window] = []
    while True:
        try:
            with Heartbeat(world, config.train.timeout_minutes) as heartbeat:
                check_equal_on_all_ranks(fingerprint(config), "the configuration")
                with RunLock(config) as lock:
                    return finish(start_run(config, world, stop, heartbeat, lock, left_out))
        except Spike as spike:
            left_out, config = spike.left_out, dataclasses.replace(config, resume="auto")
        gc.collect()  # frees the old model before the new one is built


def finish(run: Run) -> dict[str, Any]:
    """Train to `train.steps` or to a signal, report, and return the report."""
    try:
        with out_of_memory_snapshot(run):
            done = train_steps(run) and conclude(run)
        summary = done or {"stopped_by": run.stop.agreed(), "step": run.progress.step}
    except BaseException:
        run.tracker.finish({"step": run.progress.step}, exit_code=1)
        raise
    saved = run.saver.checkpointer.saved
    run.tracker.finish(summary, exit_code=0 if saved else 1)
    stopped = summary.get("stopped_by")
    at = f"at step {run.progress.step} of {run.config.train.steps}"
    if not saved:
        ended = f"stopped by {stopped}" if stopped else "ended"
        good = last_good(run.saver.checkpointer.folder)
        raise RunFailed(f"{ended} {at}, but its checkpoint could not be saved; {good}")
    if run.world.main and not stopped:
        note_finished()
    elif run.world.main:
        note_unfinished()
        told = f"stopped by {stopped} {at}; the checkpoint is saved: go on with the same command and resume=auto"
        print(told, flush=True)
    return summary


def train_steps(run: Run) -> bool:
    """Take steps and call callbacks up to `train.steps`; returns False if a signal stopped them."""
    config, progress = run.config, run.progress
    run.each(lambda callback: callback.on_start(run))
    first = progress.step + 1
    while progress.step < config.train.steps:
        run.heartbeat.step = progress.step
        batch = run.batches.next()
        if batch is None:
            run.saver.save(run, final=True)
            run.saver.checkpointer.wait()
            return False
        run.each(lambda callback: callback.before_step(run))
        log = take_step(run, *batch)
        run.each(lambda callback: callback.after_step(run, log))  # noqa: B023  (called at once)
        watch(log.loss, log.skipped, progress, config, run.saver.checkpointer, run.world)
        if progress.step == first:
            limit_nccl(AFTER_STEP_1)
        due = [callback for callback in run.callbacks.values() if callback.due(progress.step)]
        if due and progress.step < config.train.steps:
            run.each(lambda callback: callback in due and callback.on_step(run))  # noqa: B023
            run.batches.agreed = None  # a signal may have come since, and the main process may take longer
    return True


def conclude(run: Run) -> dict[str, Any] | None:
    """Save the last step, call the callbacks' `on_end` and write the summary; None if a signal came first."""
    run.saver.save(run, final=True)
    found: dict[str, Any] = {}
    for callback in run.callbacks.values():
        found |= callback.on_end(run)
        if run.stop_requested():
            run.saver.checkpointer.wait()
            return None
    run.saver.checkpointer.wait()
    dist.barrier()
    return summarize(run, found)


def out_of_memory_snapshot(run: Run) -> AbstractContextManager[None]:
    """A context that writes a GPU memory snapshot when memory runs out, if `train.profile` is set."""
    folder = run.dir / "profile" / f"process-{run.world.dist_rank}"
    return nullcontext() if run.config.train.profile is None else snapshot_when_out_of_memory(folder)
