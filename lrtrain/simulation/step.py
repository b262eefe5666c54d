"""A training step of one process of many, executed by the code of real runs on tensors without values."""

import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.schema import Config, GPUConfig
from lrtrain.distributed.sharding import local
from lrtrain.distributed.world import World
from lrtrain.errors import ConfigError
from lrtrain.model.build import make_model
from lrtrain.model.structure import factorized_layers
from lrtrain.planning.live_bytes import LiveBytes
from lrtrain.run.batches import Said
from lrtrain.run.callbacks.base import Callback
from lrtrain.run.identity import RunIdentity
from lrtrain.run.start import build_engine
from lrtrain.run.state import Run
from lrtrain.run.step import take_step
from lrtrain.simulation.device import simulated_gpu
from lrtrain.simulation.fake import faked
from lrtrain.simulation.watch import Counts, Watch
from lrtrain.tracking import Tracker


@dataclass(frozen=True)
class Simulated:
    """One step of one process."""

    config: Config
    gpu: GPUConfig
    gpus: int
    dist_rank: int
    peaks: dict[str, int]
    """Most bytes at a time, by phase: start, forward, backward, optimizer."""
    held: int
    """Bytes between steps."""
    counts: Counts
    own_flops: float
    """FLOPs of the model on this process's tokens, by `training_flops`."""
    empty_shards: int
    """Parameters of which this process has no entry."""
    took: float
    """Seconds of the simulation."""

    @property
    def peak(self) -> int:
        """Most bytes at a time."""
        return max(self.peaks.values())


def simulate(config: Config, gpus: int, dist_rank: int) -> Simulated:
    """Simulate a step of process `dist_rank` of `gpus`, on the GPU of `config.gpu`.

    Numbers read from tensors are all 2, so
    branches on values are not explored. Not simulated are reading data, initial values, callbacks and torch.compile.
    It joins a process group of its own, which this process must not have yet, and leaves it.

    Raises:
        ConfigError: if a value is wrong or cannot be simulated.
    """
    started = time.perf_counter()
    gpu = config.gpu
    if gpu is None:
        raise ConfigError("gpu=null: give the GPU to simulate, as in gpu=h100")
    if not 0 <= dist_rank < gpus:
        raise ConfigError(f"rank={dist_rank} is not one of the process ranks 0 to {gpus - 1} of gpus={gpus}")
    check(config, gpus)
    if "zero_stage" in config.engine:
        raise ConfigError("engine=deepspeed cannot be simulated; use engine=fsdp or ddp")
    if config.train.compile:
        raise ConfigError("train.compile=true cannot be simulated; set train.compile=false")
    device = simulated_gpu()
    watch = Watch(gpu, LiveBytes(device))
    dist.init_process_group("fake", rank=dist_rank, world_size=gpus)
    try:
        model = make_model(config)
        run = _run(config, World(dist_rank, dist_rank % gpu.links.per_node, gpus, device), model)
        with faked(watch):
            build_engine(run, model, fresh=False)
            run.callbacks = {"phases": _Phases(run, watch.memory)}
            empty = sum(not local(p).numel() for p in run.engine.shards.parameters())
            held = _take_counted_step(run, watch)
    finally:
        dist.destroy_process_group()
    own = run.flops.model * config.train.batch_size // gpus * config.data.seq_len
    took = time.perf_counter() - started
    return Simulated(config, gpu, gpus, dist_rank, dict(watch.memory.peak), held, watch.counts, own, empty, took)


def _run(config: Config, world: World, model: PreTrainedModel) -> Run:
    """A run as far as steps need it, without its engine. (Autotuning is a measurement; what it would choose among is
    materialized here.)"""
    absent = cast(Any, None)
    run = Run(config, world, cast(Any, SimpleNamespace(signal=None)), absent, absent)
    asked = {name: layer.execution for name, layer in factorized_layers(model).items() if layer.execution}
    executions = {name: "materialize" if execution == "auto" else execution for name, execution in asked.items()}
    run.identity = RunIdentity("simulated", config.run.name, executions=executions)
    run.cache_counts(model)
    run.batches = cast(Any, SimpleNamespace(first=lambda: 0, say=Said))
    run.schedule = choice(config.schedule)
    run.tracker = Tracker()
    return run


class _Phases(Callback):
    """Tells `LiveBytes` the phase of a step."""

    def __init__(self, run: Run, memory: LiveBytes):
        super().__init__()
        self.memory = memory
        run.engine.loss.register_forward_pre_hook(lambda *_: memory.enter("forward"))
        run.engine.loss.register_forward_hook(lambda *_: memory.enter("backward"))

    def after_backward(self, run: Run) -> None:
        self.memory.enter("optimizer")


def _take_counted_step(run: Run, watch: Watch) -> int:
    """Take a step, and count it alone; returns the bytes held before it."""
    rows = torch.zeros(run.config.train.batch_size // run.world.size, run.config.data.seq_len + 1, dtype=torch.int64)
    held, watch.counts = watch.memory.now, Counts()
    watch.memory.peak.clear()
    watch.memory.enter("start")
    take_step(run, rows, 0.0)
    return held
