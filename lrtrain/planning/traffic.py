"""Traffic between the processes of a run, and a forecast of the step time, from the model only."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrtrain.config.dtypes import DTYPES
from lrtrain.config.schema import Config
from lrtrain.engine.tensor import cut_dimensions, latent_width
from lrtrain.errors import ConfigError
from lrtrain.model.flops import training_flops
from lrtrain.model.structure import blocks


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process receives in one optimizer step."""

    gathered: int
    """Parameters of the other shards, for forward and backward passes."""
    reduced: int
    """Gradients of its own shard from the others of its group (ring: as many as it sends)."""
    replicated: int
    """Gradients summed over the replicas, once a step."""

    latents: int
    """Latents and token ids of tensor parallelism, within its groups."""

    @property
    def total(self) -> int:
        return self.gathered + self.reduced + self.replicated + self.latents


def traffic(config: Config, model: PreTrainedModel, dtype: torch.dtype, world_size: int) -> Traffic:
    """The traffic of FSDP2 with `engine.replicas` copies of the model (DDP: one copy per process), without that of
    optimizers (small, see docs/optimizers.md) and losses.

    Blocks are gathered for the forward and again for the backward pass; head and last norm stay gathered, and the
    embedding is not needed again. Each process already has 1/shards of everything. A ring all-reduce of s bytes over r
    processes passes 2(r − 1)/r · s through each.

    Raises:
        ConfigError: for DeepSpeed, whose traffic depends on its own choices.
    """
    if "zero_stage" in config.engine:
        raise ConfigError("engine=deepspeed is not foretold; scripts/wire_bytes.py counts what a step of it sends")
    engine = config.engine
    replicas, degree = engine.get("replicas", world_size), engine.get("tensor", 1)
    shards = world_size // replicas
    passes = config.train.batch_size // (world_size * config.train.micro_batch_size)
    reduce_bytes = DTYPES[engine.get("reduce_dtype", "fp32")].itemsize
    cut = dimensions_cut(model) if degree > 1 else {}

    def sent(parameters: Iterable[Tensor]) -> tuple[float, float]:
        """Values that a process receives to gather parameters once, and values in its own shards."""
        received = held = 0.0
        for p in parameters:
            over = shards // degree if p in cut else shards
            size = padded(p, over, degree, cut.get(p)) / over
            received, held = received + (over - 1) * size, held + size
        return received, held

    gathers = sent(model.parameters())[0] + sent(blocks(model).parameters())[0]
    reduced, held = sent(p for p in model.parameters() if p.requires_grad)
    return Traffic(
        gathered=round(passes * gathers * dtype.itemsize),
        reduced=round(passes * reduced * reduce_bytes),
        replicated=round(2 * (replicas - 1) / replicas * held * reduce_bytes),
        latents=round(passes * latent_bytes(config, model, dtype, degree)) if degree > 1 else 0,
    )


def dimensions_cut(model: PreTrainedModel) -> dict[Tensor, int]:
    """The parameters that tensor parallelism cuts → their dimension."""
    return {layer.get_parameter(name): dim for block in blocks(model) for layer, name, dim in cut_dimensions(block)}


def padded(p: Tensor, shards: int, parts: int = 1, dim: int | None = None) -> int:
    """The number of values of a parameter, or of one of its `parts` along `dim`, with rows padded so that all shards
    are equal."""
    shape = [*p.shape]
    if dim is not None:
        shape[dim] //= parts
    return math.ceil(shape[0] / shards) * shards * math.prod(shape[1:])


def latent_bytes(config: Config, model: PreTrainedModel, dtype: torch.dtype, degree: int) -> int:
    """Bytes that a process receives in one pass forward and backward by tensor parallelism of this degree.

    Each block gathers the latents of the layers that read the residual stream and sums those of the layers that write
    to it; the backward pass sums and gathers their gradients. Recomputed blocks repeat the forward pass.
    """
    tokens = config.train.micro_batch_size * config.data.seq_len
    every = config.train.recompute_every
    passes = [3 if every and i % every == 0 else 2 for i in range(len(blocks(model)))]
    values = sum(count * latent_width(block) for count, block in zip(passes, blocks(model), strict=True))
    ids = config.train.micro_batch_size * (config.data.seq_len + 1) * torch.int64.itemsize
    return (degree - 1) * (tokens * values * dtype.itemsize + ids)


@dataclass(frozen=True)
class Hardware:
    """Assumptions of the forecast about each GPU."""

    flops: float
    """Per second, of large matrix products in the dtype of the arithmetic."""
    efficiency: float
    """The share of them that a training step reaches alone, without communication: `perf/mfu` of one process."""
    bandwidth: float
    """Bytes per second that it receives while it also sends, over the slowest link on the ring."""
    within: float | None = None
    """The same for latents of tensor parallelism, whose groups are within a node; None: `bandwidth`."""


@dataclass(frozen=True)
class Forecast:
    """Of one optimizer step."""

    compute_seconds: float
    wire_seconds: float
    best_mfu: float
    """If communication and computation overlap fully."""
    worst_mfu: float
    """If they do not overlap."""


def forecast(config: Config, model: PreTrainedModel, sent: Traffic, hardware: Hardware, world_size: int) -> Forecast:
    """Time and model FLOPs utilization of one step."""
    tokens = config.train.batch_size * config.data.seq_len
    ideal = training_flops(model, config.data.seq_len).model * tokens / world_size / hardware.flops
    compute = ideal / hardware.efficiency
    wire = (sent.total - sent.latents) / hardware.bandwidth + sent.latents / (hardware.within or hardware.bandwidth)
    return Forecast(compute, wire, ideal / max(compute, wire), ideal / (compute + wire))
