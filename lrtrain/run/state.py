"""The state of a run on one process, shared by steps and callbacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lrtrain.checkpoint.meta import Progress
from lrtrain.config.choice import choice
from lrtrain.config.schema import Config
from lrtrain.core.metrics import Metric, scalars
from lrtrain.data.prepare import Data
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.heartbeat import Heartbeat
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine
from lrtrain.engine.resize import wanted_ranks
from lrtrain.errors import ConfigError
from lrtrain.measure.evaluate import Evaluation, evaluate, evenly_spaced
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, parameter_count, trainable_count
from lrtrain.model.flops import training_flops
from lrtrain.model.rank import RankPlan, mean_rank
from lrtrain.model.structure import factorized_layers
from lrtrain.model.supports import support_hash
from lrtrain.run.batches import Batches
from lrtrain.run.callbacks.base import Callback
from lrtrain.run.identity import RunIdentity
from lrtrain.run.lock import RunLock
from lrtrain.run.saver import Saver
from lrtrain.run.stop import StopRequest
from lrtrain.tracking import Tracker


class Run:
    """The state of a run, filled by `lrtrain.run.start.start_run` in the order of dependencies."""

    data: Data
    rank_plan: RankPlan
    engine: Engine
    saver: Saver
    batches: Batches
    schedule: Callable[[int, int], float]
    tracker: Tracker
    callbacks: Mapping[str, Callback]
    identity: RunIdentity

    def __init__(self, config: Config, world: World, stop: StopRequest, heartbeat: Heartbeat, lock: RunLock):
        self.config = config
        self.world = world
        self.stop = stop
        self.heartbeat = heartbeat
        self.lock = lock
        self.dir = Path(config.run.dir)
        self.progress = Progress()

    def cache_counts(self, model: PreTrainedModel) -> None:
        """Cache the layers, FLOPs and parameter counts of a model on meta."""
        self.layers = factorized_layers(model)
        for name, layer in self.layers.items():
            layer.execution = self.identity.executions.get(name)
        self.flops = training_flops(model, self.config.data.seq_len)
        self.counts = {
            "rank": mean_rank(model),
            "parameters": parameter_count(model),
            "parameters_trainable": trainable_count(model),
            "parameters_dense": dense_parameter_count(model),
            "optimizer_bytes": choice(self.config.optim)(model).state_bytes(),
        }

    def log(self, metrics: Sequence[Metric]) -> None:
        """Record metrics of the current step."""
        self.tracker.log(self.progress.step, self.progress.tokens, metrics)

    def stop_requested(self) -> bool:
        """Whether any process got a signal; a collective, so that all stop at the same step."""
        return sum_over_ranks(self.stop.signal is not None)[0] > 0

    def each(self, call: Callable[[Callback], Any]) -> float:
        """Call every callback in order; returns the seconds that this took."""
        started = time.perf_counter()
        for callback in self.callbacks.values():
            call(callback)
        return time.perf_counter() - started

    def held_out_loss(self) -> Evaluation | None:
        """The loss on the validation set; None if there is none, or a signal interrupted the evaluation."""
        indices = evenly_spaced(len(self.data.validation), self.config.eval.sequences)
        if not indices:
            return None
        rows = self.data.validation.rows(indices)
        size = self.config.train.micro_batch_size
        return evaluate(self.engine.loss, rows, size, self.world, stop=self.stop_requested)

    def resize_layers(self) -> None:
        """Shrink the layers that want smaller ranks now; a collective."""
        step = self.progress.step
        ranks = wanted_ranks(factorized_layers(self.engine.shards), step)
        if all(layer.rank == ranks[name] for name, layer in self.layers.items()):
            return
        if grown := [name for name, layer in self.layers.items() if ranks[name] > layer.rank]:
            raise ConfigError(
                f"{grown[0]} wants rank {ranks[grown[0]]}, but has {self.layers[grown[0]].rank}: ranks shrink only"
            )
        before = self.counts["parameters"]
        self.rank_plan = replace(self.rank_plan, exact=ranks)
        model = make_model(self.config, self.rank_plan, self.engine.model.config.to_dict())
        self.cache_counts(model)
        self.engine.resize(model, choice(self.config.optim))
        self.support_hash = support_hash(self.engine.model)
        now = self.counts["parameters"]
        self.log(scalars("train", {"parameters": now}))
        if self.world.main:
            print(f"step {step}: smaller ranks, {now:,} parameters instead of {before:,}", flush=True)
