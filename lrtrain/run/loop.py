"""The training loop. It knows no method by name: model, optimizer and engine come from the configuration."""

import dataclasses
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock
from transformers import PreTrainedModel

from lrtrain import distributed
from lrtrain.checkpoint.checkpointer import Checkpointer, last_good, read_meta, write_durably
from lrtrain.config.choice import choice
from lrtrain.config.naming import fingerprint
from lrtrain.config.schema import Config, as_dict, compute_dtype
from lrtrain.core.seeds import generator_for, integer_seed
from lrtrain.data.prepare import prepare_data
from lrtrain.distributed.collectives import (
    check_equal_on_all_ranks,
    max_over_ranks,
    run_on_all_ranks,
    run_on_rank0,
    sum_over_ranks,
)
from lrtrain.distributed.heartbeat import Heartbeat
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine, StepResult
from lrtrain.engine.resize import wanted_ranks
from lrtrain.errors import ConfigError, RunFailed
from lrtrain.init_from.start import Start
from lrtrain.measure.evaluate import Evaluation, evaluate, evenly_spaced, perplexity
from lrtrain.measure.monitor import Monitor
from lrtrain.measure.truncation import Truncation, evaluate_truncated, truncation_rows
from lrtrain.model.autotune import settle
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, parameter_count, trainable_count, training_flops
from lrtrain.model.rank import mean_rank
from lrtrain.model.structure import factorized_layers
from lrtrain.model.supports import support_hash
from lrtrain.run.profiling import profiled, snapshot_when_out_of_memory
from lrtrain.run.progress import Progress, Window
from lrtrain.run.report import print_ledger, summary_rows
from lrtrain.run.rollback import Spike, beyond, watch
from lrtrain.run.rundir import check_compatible, checkpoint_to_resume, claim, hold, known_run
from lrtrain.run.stop import StopRequest
from lrtrain.run.throughput import Meter, matmul_peak, peak_memory_gib
from lrtrain.tracking import Tracker, open_tracker
from lrtrain.tracking.console import print_summary

T = TypeVar("T")


def pretrain(config: Config) -> None:
    """Join the process group, `train` until a signal or the end, and leave the group."""
    world = distributed.start(config.optim["in_backward"], config.train.timeout_minutes)
    stop = StopRequest()
    try:
        train(config, world, stop)
    finally:
        stop.restore()
        distributed.stop()


def train(config: Config, world: World, stop: StopRequest) -> dict[str, Any]:
    """Train as configured, from the start or from where the run stopped. Every process of the group calls it.

    Returns:
        What summary.json holds; `stopped_by` and `step` of a run that a signal ended before its end.

    Raises:
        ConfigError: for whatever the configuration has wrong, on every process.
        Diverged: after `train.max_skipped` steps in a row without a finite loss and gradient.
        RunFailed: if the last checkpoint could not be saved.
    """
    left_out: list[Window] = []
    while True:
        try:
            with Heartbeat(world, config.train.timeout_minutes) as heartbeat:
                check_equal_on_all_ranks(fingerprint(config), "the configuration")
                return Trainer(config, world, stop, heartbeat, left_out).run()
        except Spike as spike:
            left_out, config = spike.left_out, dataclasses.replace(config, resume="auto")
        gc.collect()  # the model that spiked, before there is another


class Trainer:
    """One run on one process among others: what it owns, in the order in which it is built."""

    def __init__(
        self, config: Config, world: World, stop: StopRequest, heartbeat: Heartbeat, left_out: Sequence[Window] = ()
    ):
        self.config = config
        self.world = world
        self.stop = stop
        self.heartbeat = heartbeat
        self.run_dir = Path(config.run.dir)
        self.progress = Progress()
        if config.train.compile and world.device.type == "cpu":
            ask_for_vector_instructions()

        checkpoint = run_on_rank0(lambda: checkpoint_to_resume(config))
        self.meta = read_meta(checkpoint) if checkpoint else {}
        self.ranks: dict[str, int] = self.meta.get("ranks", {})
        known = self.meta.get("architecture")
        model = make_model(config, self.ranks, known)
        choice(config.optim)(model)  # on meta: whatever it refuses is said before anything is built
        self.data = run_on_all_ranks(lambda: prepare_data(config.data, config.train.seed))
        check_equal_on_all_ranks(self.data.fingerprint, "the data")
        self.unreadable = self.data.faults.count
        if self.unreadable and world.main:
            print(f"data: {self.unreadable} unreadable documents are left out, the first: {self.data.faults.first}")
        self._check_sizes(model)
        if checkpoint:
            check_compatible(config, self.data.fingerprint, checkpoint, self.meta)
        start = Start(config, model, world) if config.init_from and not checkpoint else None
        if start and start.ranks:
            self.ranks = start.ranks
            model = make_model(config, self.ranks, known)
        dtype = compute_dtype(config, world.device)
        run, self.settled = run_on_rank0(lambda: self._claim(model, dtype))
        self.lock = FileLock(self.run_dir / "lock")
        run_on_rank0(lambda: hold(self.lock))
        self._take_stock(model)
        if world.main:
            print_ledger(model)

        train = config.train
        peak = matmul_peak(world.device, dtype)
        self.engine: Engine = choice(config.engine)(
            world=world,
            dtype=dtype,
            compile=train.compile,
            recompute_every=train.recompute_every,
            recompute_keep=train.recompute_keep,
        )
        self.engine.prepare(model, train.seed, choice(config.optim), fresh=not (checkpoint or start))
        self.support_hash = support_hash(self.engine.model)
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints",
            world,
            config.checkpoint.keep,
            config.checkpoint.keep_every,
            config.checkpoint.asynchronous,
        )
        if checkpoint:
            self._load(checkpoint)
        elif start:
            state = self.engine.state_dict()
            start.fill(state["model"])
            self.engine.load_state_dict(state)
        if left_out:  # by a rollback that this run goes on from
            self.progress.left_out = [*left_out]

        self.schedule = choice(config.schedule)
        self.meter = Meter(peak, self.flops, world.size)
        self.monitor = Monitor(config, self.engine, self.data, world)
        self.read_seconds = 0.0
        ours = checkpoint and config.resume == "auto"  # another run's checkpoint does not save this one
        self.saved_at = (self.progress.step if ours else -1, time.monotonic())
        self.tracker = (
            open_tracker(config.tracking, self.run_dir, run["id"], as_dict(config), train.steps)
            if world.main
            else Tracker()
        )
        if left_out:
            self.tracker.log(self.progress.step, self.progress.tokens, {"train/rollbacks": len(left_out)})

    def _take_stock(self, model: PreTrainedModel) -> None:
        """All that the run keeps of its model besides the engine's."""
        self.layers = factorized_layers(model)
        for name, layer in self.layers.items():
            layer.execution = self.settled["executions"].get(name)
        self.flops = training_flops(model, self.config.data.seq_len)
        self.counts = {
            "rank": mean_rank(model),
            "parameters": parameter_count(model),
            "parameters_trainable": trainable_count(model),
            "parameters_dense": dense_parameter_count(model),
            "optimizer_bytes": choice(self.config.optim)(model).state_bytes(),
        }

    # --- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to `train.steps`, or to a signal; then report, and return the report."""
        try:
            with self._snapshot():
                done = self._train() and self._conclude()
            summary = done or {
                "stopped_by": self.stop.signal or "a signal to another process",
                "step": self.progress.step,
            }
        except BaseException:
            self.tracker.finish({"step": self.progress.step}, exit_code=1)
            raise
        finally:
            self.lock.release()
        self.tracker.finish(summary, exit_code=0 if self.checkpointer.saved else 1)
        stopped = summary.get("stopped_by")
        at = f"at step {self.progress.step} of {self.config.train.steps}"
        if not self.checkpointer.saved:
            ended = f"stopped by {stopped}" if stopped else "ended"
            raise RunFailed(
                f"{ended} {at}, but its checkpoint could not be saved; {last_good(self.checkpointer.folder)}"
            )
        if self.world.main and stopped:
            print(
                f"stopped by {stopped} {at}; the checkpoint is saved: go on with the same command and resume=auto",
                flush=True,
            )
        return summary

    def _snapshot(self) -> AbstractContextManager[None]:
        """What is to be left behind if a GPU's memory runs out, where that was asked for."""
        folder = self.run_dir / "profile" / f"process-{self.world.dist_rank}"
        return nullcontext() if self.config.train.profile is None else snapshot_when_out_of_memory(folder)

    def _train(self) -> bool:
        """The steps; whether no signal ended them."""
        config, progress = self.config, self.progress
        if progress.step == 0:
            self._measure_spectra()
            if config.init_from and config.train.steps:
                self._evaluate()
        while progress.step < config.train.steps:
            self.heartbeat.step = progress.step
            rows = self._next_rows()
            if rows is None:
                self._save()
                self.checkpointer.wait()
                return False
            looked_at = self.world.main and config.train.profile == progress.step + 1
            with profiled(self.run_dir / "profile") if looked_at else nullcontext():
                self._step(rows)
            if due(config.checkpoint.every, progress.step):
                self._save()
            last = progress.step == config.train.steps
            if due(config.spectra.every, progress.step) and not last:
                self._measure_spectra()
            if due(config.eval.every, progress.step) and not last:
                self._evaluate()
        return True

    def _next_rows(self) -> torch.Tensor | None:
        """This process's rows of the next step; None if a signal to any process came first.

        Read on a thread, so that a signal is heeded, and an overdue checkpoint saved, while a source keeps us waiting.
        """
        read = partial(
            self.data.train.batch,
            self._start_of_batch(),
            self.config.train.batch_size,
            self.world.dist_rank,
            self.world.size,
        )
        reading = in_background(read)
        minutes = self.config.train.timeout_minutes
        deadline = time.monotonic() + 60 * minutes
        while True:
            wait([reading], timeout=1.0)
            done = reading.done()
            waiting, failed, stop, overdue, unreadable = sum_over_ranks(
                not done,
                done and reading.exception() is not None,
                self.stop.signal is not None,
                self._overdue(),
                self.data.train.faults.count,
            )
            if stop:
                return None
            if overdue:
                self._save()
            if not waiting:
                self._count_unreadable(self.data.faults.count + int(unreadable))
                rows, self.read_seconds = run_on_all_ranks(reading.result) if failed else reading.result()
                return rows
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{waiting:g} of {self.world.size} processes have waited for the batch of step "
                    f"{self.progress.step + 1} for train.timeout_minutes={minutes:g}"
                )

    def _count_unreadable(self, count: int) -> None:
        """Log what was left out of the data, if it became more."""
        if count > self.unreadable:
            self.tracker.log(self.progress.step, self.progress.tokens, {"data/unreadable": count})
        self.unreadable = count

    def _start_of_batch(self) -> int:
        """The position of the next step's first sequence."""
        return beyond(self.progress.position, self.config.train.batch_size, self.progress.left_out)

    def _step(self, rows: torch.Tensor) -> None:
        """One optimizer step on this process's `rows` of the global batch."""
        config, progress = self.config, self.progress
        started = time.perf_counter()
        # Dropout draws from a function of (seed, step, process): no generator state to save.
        torch.manual_seed(integer_seed(config.train.seed, f"step {progress.step} process {self.world.dist_rank}"))
        tokens = config.train.batch_size * config.data.seq_len
        for layer in self.layers.values():
            layer.draw(generator_for(config.train.seed, f"draw of step {progress.step}"))
        lr = config.optim["lr"] * self.schedule(progress.step, config.train.steps)
        self.engine.begin_step(progress.step, lr, config.train.clip, config.train.clip_by)
        micros = rows.split(config.train.micro_batch_size)
        losses = [self.engine.forward_backward(micro, tokens, micro is micros[-1]) for micro in micros]
        loss, *parts = sum_over_ranks(*(torch.stack(losses).double().sum(0) / tokens).tolist())
        gradients, looking = self._measure_gradients()
        result = self.engine.clip_and_step(loss)

        progress.step += 1
        self.engine.revise(progress.step)
        self._resize()
        progress.position = self._start_of_batch() + config.train.batch_size
        seconds = time.perf_counter() - started - looking + self.read_seconds
        progress.seconds += seconds
        self.meter.add(seconds, self.read_seconds, tokens)
        self._account(result, tokens)
        if gradients:
            self.tracker.log(progress.step, progress.tokens, gradients)
        if progress.step == 1 or progress.step % config.train.log_every == 0 or progress.step == config.train.steps:
            self._log(
                {"train/loss": loss, "train/grad_norm": result.grad_norm, "train/lr": lr}
                | {"train/ppl": perplexity(parts[0] if parts else loss)}
                | ({"train/aux_loss": parts[1]} if parts else {})
                | self.engine.optimizer.metrics()
            )
        watch(loss, result.skipped, progress, config, self.checkpointer, self.world)

    def _resize(self) -> None:
        """Go on with smaller tensors where layers want smaller ranks now."""
        ranks = wanted_ranks(factorized_layers(self.engine.shards), self.progress.step)
        if all(layer.rank == ranks[name] for name, layer in self.layers.items()):
            return
        before = self.counts["parameters"]
        self.ranks = ranks
        model = make_model(self.config, ranks, self.engine.model.config.to_dict())
        self._take_stock(model)
        self.engine.resize(model, choice(self.config.optim))
        self.support_hash = support_hash(self.engine.model)
        self.meter.flops = self.flops
        now = self.counts["parameters"]
        self.tracker.log(self.progress.step, self.progress.tokens, {"train/parameters": now})
        if self.world.main:
            print(f"step {self.progress.step}: smaller ranks, {now:,} parameters instead of {before:,}", flush=True)

    def _account(self, result: StepResult, tokens: int) -> None:
        """Count a step that trained; tell of one that was skipped."""
        progress = self.progress
        if not result.skipped:
            progress.tokens += tokens
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if self.world.main:
            print(f"step {progress.step} skipped: its loss or gradient is not finite", file=sys.stderr, flush=True)
        self.tracker.log(progress.step, progress.tokens, {"train/skipped": progress.skipped})

    def _overdue(self) -> bool:
        """Whether the main process's clock says that a checkpoint is due; the others follow it."""
        return self.world.main and time.monotonic() - self.saved_at[1] > 60 * self.config.checkpoint.minutes

    def _stop_requested(self) -> bool:
        """Whether any process got a signal: a collective, so that all stop at the same place."""
        return sum_over_ranks(self.stop.signal is not None)[0] > 0

    # --- looking at the model ------------------------------------------------------------------------------------

    def _evaluate(self) -> Evaluation | None:
        """The loss on the held-out set, logged; None if nothing is held out or a signal cut it short."""
        started = time.perf_counter()
        found = self._held_out()
        if found is not None:
            seconds = {"perf/eval_seconds": time.perf_counter() - started}
            self.tracker.log(self.progress.step, self.progress.tokens, found.metrics(self.config.eval.compat) | seconds)
        return found

    def _held_out(self) -> Evaluation | None:
        """The loss on the held-out set; None if nothing is held out or a signal cut it short."""
        indices = evenly_spaced(len(self.data.validation), self.config.eval.sequences)
        if not indices:
            return None
        return evaluate(
            self.engine.model,
            self.data.validation.rows(indices),
            self.config.train.micro_batch_size,
            self.world,
            stop=self._stop_requested,
        )

    def _evaluate_truncated(self) -> list[Truncation]:
        """The losses at the smaller ranks that the layers offer, logged."""
        found = evaluate_truncated(self.engine.model, self.counts["parameters"], self._held_out)
        if found:
            metrics = {key: value for truncation in found for key, value in truncation.metrics().items()}
            self.tracker.log(self.progress.step, self.progress.tokens, metrics)
        return found

    def _measure_spectra(self) -> dict[str, float]:
        """The spectra of all matrices, logged; returns their metrics."""
        if not self.monitor.active:
            return {}
        started = time.perf_counter()
        metrics, arrays = self.monitor.measure()
        seconds = time.perf_counter() - started
        progress = self.progress
        progress.spectra_seconds += seconds
        metrics["perf/spectra_seconds"] = seconds
        if progress.seconds:
            everything = progress.seconds + progress.spectra_seconds
            metrics["perf/spectra_pct"] = 100 * progress.spectra_seconds / everything
        self.tracker.log(self.progress.step, self.progress.tokens, metrics)
        if arrays:
            self.tracker.log_spectra(self.progress.step, {name: values.numpy() for name, values in arrays.items()})
        return metrics

    def _measure_gradients(self) -> tuple[dict[str, float], float]:
        """The metrics of the gradients of the step under way, if due, and the seconds that they took."""
        layers = self.monitor.gradients_due(self.progress.step + 1)
        if not layers:
            return {}, 0.0
        started = time.perf_counter()
        metrics = self.monitor.gradients.measure(layers)
        seconds = time.perf_counter() - started
        self.progress.spectra_seconds += seconds
        return metrics, seconds

    def _log(self, metrics: dict[str, float]) -> None:
        memory = peak_memory_gib(self.world.device)
        (most,) = max_over_ranks(memory)
        self.tracker.log(
            self.progress.step,
            self.progress.tokens,
            metrics | {"perf/memory_gib": most} | self.meter.read(),
        )

    def _conclude(self) -> dict[str, Any] | None:
        """Save, evaluate, measure, and write summary and plot of a finished run; None if a signal came first."""
        progress = self.progress
        self._save()
        short = 0 < progress.step < self.config.eval.every  # too short for its cadence
        found = None if short else self._evaluate()
        if found is None and self._stop_requested():
            self.checkpointer.wait()
            return None
        truncations = self._evaluate_truncated() if found else []
        spectra = self._measure_spectra()
        self.checkpointer.wait()
        dist.barrier()
        (memory,) = max_over_ranks(peak_memory_gib(self.world.device))
        summary = {
            "run": self.config.run.name,
            "step": progress.step,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            **self.counts,
            "eval_loss": found.loss if found else None,
            "eval_perplexity": perplexity(found.loss) if found else None,
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "memory_gib": memory,
            "effective_rank": spectra.get("spectra/summary/all/erank_mean"),
            "world_size": self.world.size,
            **{f"parameters_at_rank_share_{t.share:g}": t.parameters for t in truncations},
            **{f"eval_loss_at_rank_share_{t.share:g}": t.loss for t in truncations},
        }
        if self.world.main:
            rows = summary_rows(summary) | truncation_rows(truncations)
            try:
                rows |= {"picture": str(self._write_summary(summary))}
            except OSError as error:
                print(f"summary.json and its picture could not be written: {error}", file=sys.stderr, flush=True)
            print_summary(rows, sys.stdout)
        return {key: value for key, value in summary.items() if value is not None}

    def _write_summary(self, summary: dict[str, Any]) -> Path:
        """summary.json and the picture of the run, whose path this gives."""
        from lrtrain.analysis.plots import plot_run  # matplotlib takes a while to import: not before the first step

        write_durably(self.run_dir / "summary.json", json.dumps(summary, indent=1))
        picture = plot_run(self.run_dir)
        self.tracker.log_image(self.progress.step, "plots/run", picture)
        return picture

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begin a checkpoint of this step, unless it has one."""
        if self.saved_at[0] == self.progress.step:
            self.checkpointer.wait()
            if self.checkpointer.saved:
                return
        meta = {
            "progress": asdict(self.progress),
            "data": {"fingerprint": self.data.fingerprint, "state": self.data.train.state(self.progress.position)},
            "config": as_dict(self.config),
            **self.settled,
            "ranks": self.ranks,
            "architecture": self.engine.model.config.to_dict(),
            "support_hash": self.support_hash,
            "versions": {name: version(name) for name in ("torch", "transformers", "datasets")},
            "world_size": self.world.size,
        }
        started = time.perf_counter()
        self.checkpointer.save(self.engine.state_dict(), self.progress.step, meta)
        self.saved_at = (self.progress.step, time.monotonic())
        self.tracker.log(
            self.progress.step, self.progress.tokens, {"perf/checkpoint_seconds": time.perf_counter() - started}
        )

    def _load(self, checkpoint: Path) -> None:
        state = self.engine.state_dict()
        self.checkpointer.load(state, checkpoint)
        self.engine.load_state_dict(state)
        if self.meta["support_hash"] != self.support_hash:
            raise ConfigError(f"{checkpoint} was trained with other sparse supports than train.seed gives here")
        if self.meta["data"]["fingerprint"] == self.data.fingerprint:
            self.progress = Progress(**self.meta["progress"])
            self.data.train.load_state(self.meta["data"]["state"])
        if self.world.main:
            there, here = self.meta["config"]["engine"]["name"], self.config.engine["name"]
            moved = f", saved by engine={there} and loaded by engine={here}" if there != here else ""
            print(f"going on from {checkpoint} at step {self.progress.step}{moved}", flush=True)

    # --- before anything is built ----------------------------------------------------------------------------------

    def _claim(self, model: PreTrainedModel, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
        """What identifies the run, and how its layers are executed: as before, if that was measured in this dtype on
        such a device."""
        device, tokens = self.world.device, self.config.train.micro_batch_size * self.config.data.seq_len
        known = known_run(self.config)
        before, place = self.meta or known or {}, f"{dtype} on {device.type}"
        measured = before.get("executions", {}) if before.get("executed", place) == place else {}
        settled = {"executions": settle(model, tokens, dtype, device, measured), "executed": place}
        return known or claim(self.config, settled, self.data.tokenizer), settled

    def _check_sizes(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        pieces = len(self.data.tokenizer)
        if pieces > config.vocab_size:
            raise ConfigError(
                f"model.vocab_size={config.vocab_size} is below the tokenizer's {pieces} pieces; raise it, or lower "
                f"data.tokenizer.vocab_size"
            )
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and self.config.data.seq_len > longest:
            raise ConfigError(
                f"data.seq_len={self.config.data.seq_len} is above the model's max_position_embeddings={longest}"
            )


def ask_for_vector_instructions() -> None:
    """Let torch.compile find out what this CPU has before its first kernel is due: it asks the C++ compiler, which
    takes seconds where it was never asked, while the data is prepared."""
    import torch._inductor.compile_fx  # noqa: F401  whole at first: two threads that import from each other may fail
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    in_background(pick_vec_isa)


def in_background(call: Callable[[], T]) -> Future[tuple[T, float]]:
    """(result, seconds) of `call`, made on a thread that does not hold up the end of the process."""
    future: Future[tuple[T, float]] = Future()

    def run() -> None:
        started = time.perf_counter()
        try:
            future.set_result((call(), time.perf_counter() - started))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0
