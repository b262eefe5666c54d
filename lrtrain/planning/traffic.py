"""Traffic between the processes of a run, and a forecast of the step time, from the model only."""

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from lrtrain.config.dtypes import DTYPES
from lrtrain.config.schema import Config
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

    @property
    def total(self) -> int:
        return self.gathered + self.reduced + self.replicated


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
    replicas = config.engine.get("replicas", world_size)
    shards = world_size // replicas
    passes = config.train.batch_size // (world_size * config.train.micro_batch_size)
    reduce_bytes = DTYPES[config.engine.get("reduce_dtype", "fp32")].itemsize
    others = (shards - 1) / shards
    gathers = rows_padded(model, shards) + rows_padded(blocks(model), shards)
    trained = sum(padded(p, shards) for p in model.parameters() if p.requires_grad)
    return Traffic(
        gathered=round(passes * others * gathers * dtype.itemsize),
        reduced=round(passes * others * trained * reduce_bytes),
        replicated=round(2 * (replicas - 1) / replicas * trained / shards * reduce_bytes),
    )


def rows_padded(module: torch.nn.Module, shards: int) -> int:
    """The number of values sent for a module's parameters, padding included."""
    return sum(padded(p, shards) for p in module.parameters())


def padded(p: torch.Tensor, shards: int) -> int:
    """The number of values of a parameter with rows padded so that all shards are equal."""
    return math.ceil(p.shape[0] / shards) * shards * math.prod(p.shape[1:])


def tensor_parallel_bytes(config: Config, model: PreTrainedModel, dtype: torch.dtype, degree: int) -> int:
    """Bytes per process and step of Megatron's tensor parallelism of this degree, which lrtrain does not have: each
    block sums its activations (tokens, d) twice in each direction."""
    tokens = config.train.micro_batch_size * config.data.seq_len
    width = model.config.get_text_config().hidden_size
    return round(4 * len(blocks(model)) * tokens * width * dtype.itemsize * 2 * (degree - 1) / degree)


@dataclass(frozen=True)
class Hardware:
    """Assumptions of the forecast about each GPU."""

    flops: float
    """Per second, of large matrix products in the dtype of the arithmetic."""
    efficiency: float
    """The share of them that a training step reaches alone, without communication: `perf/mfu` of one process."""
    bandwidth: float
    """Bytes per second that it receives while it also sends, over the slowest link on the ring."""


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
    compute, wire = ideal / hardware.efficiency, sent.total / hardware.bandwidth
    return Forecast(compute, wire, ideal / max(compute, wire), ideal / (compute + wire))
