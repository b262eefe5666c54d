"""Sharded data parallelism by torch's FSDP2, block by block: one copy of the model over all processes (FSDP), over each
group of processes (HSDP), or on each process (DDP)."""

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from lrtrain.config.dtypes import DTYPES, Dtype
from lrtrain.config.schema import Config
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine, Spread
from lrtrain.errors import ConfigError
from lrtrain.model.init import materialize
from lrtrain.model.structure import blocks


class FSDPEngine(Engine):
    """FSDP2 over all processes.

    Args:
        replicas: number of groups that each hold the whole model; divides the number of processes.
        reduce_dtype: dtype in which gradients are reduced, fp32 or bf16.
    """

    def __init__(
        self,
        world: World,
        dtype: torch.dtype,
        compile: bool,
        recompute_every: int,
        recompute_keep: str,
        replicas: PositiveInt,
        reduce_dtype: Dtype,
    ):
        super().__init__(world, dtype, compile, recompute_every, recompute_keep)
        self.mesh = device_mesh(world, replicas)
        self.reduce_dtype = DTYPES[reduce_dtype]

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        replicas = config.engine.get("replicas", 1)
        if world_size % replicas:
            raise ConfigError(f"engine.replicas={replicas} does not divide the {world_size} processes")

    @classmethod
    def spread(cls, config: Config, world_size: int) -> Spread:
        shards = world_size // config.engine["replicas"]
        return Spread(shards, shards, shards)

    def _distribute(self, model: PreTrainedModel, seed: int, fresh: bool) -> PreTrainedModel:
        own_dtype = next(model.parameters()).dtype
        if self.world.size > 1 or self.dtype != own_dtype:  # else nothing to shard or cast
            self._shard(model)
        materialize(model, seed, self.world.device, fresh)
        return model

    def _shard(self, model: PreTrainedModel) -> None:
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=self.reduce_dtype)
        head, in_loss = model.get_output_embeddings(), self.loss.head
        units = [in_loss if in_loss is not None and unit is head else unit for unit in sharded_units(model)]
        for unit in units:
            kept = unit is head or unit is in_loss  # its backward pass comes next
            own = fully_shard(unit, mesh=self.mesh, mp_policy=policy, reshard_after_forward=not kept)
            own.set_unshard_in_backward(not isinstance(unit, nn.Embedding))  # its gradient needs no weight
        # The root also reaches the head's parameters through the model's own head, which is not wrapped.
        elsewhere = {*in_loss.parameters()} if in_loss in units else None
        fully_shard(self.loss, mesh=self.mesh, mp_policy=policy, ignored_params=elsewhere)
        for module in self._sharded():
            module.set_gradient_divide_factor(1.0)  # sum the gradients: the loss is divided by all tokens already
            module.set_force_sum_reduction_for_comms(True)
            module.register_forward_hook(_reshard_without_gradient)  # pyright: ignore[reportAttributeAccessIssue]

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.loss.modules() if isinstance(module, FSDPModule)]

    def forward_backward(self, rows: Tensor, tokens: int, last: bool = True) -> Tensor:
        if isinstance(self.loss, FSDPModule):
            self.loss.set_requires_all_reduce(last)  # across replicas once per step; within a replica every micro-batch
        losses = self.loss(rows.to(self.world.device, non_blocking=True))
        if self.in_backward is None or math.isfinite(sum_over_ranks(losses[0].item())[0]):
            (losses[0] / tokens).backward()
        else:
            for module in self._sharded():  # what waits for the backward pass
                module.reshard()
        return losses.detach()


class DDPEngine(FSDPEngine):
    """Each process holds the whole model; gradients are all-reduced once per step, block by block during the last
    backward pass. It is FSDP2 with one replica per process, so nothing is gathered."""

    def __init__(
        self,
        world: World,
        dtype: torch.dtype,
        compile: bool,
        recompute_every: int,
        recompute_keep: str,
        reduce_dtype: Dtype,
    ):
        super().__init__(world, dtype, compile, recompute_every, recompute_keep, world.size, reduce_dtype)

    @classmethod
    def spread(cls, config: Config, world_size: int) -> Spread:
        return Spread(1, 1, 1)


def _reshard_without_gradient(module: FSDPModule, *_: object) -> None:
    """Reshard head and root after a forward pass without a backward pass, for which they otherwise stay gathered."""
    if not torch.is_grad_enabled():
        module.reshard()


def sharded_units(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that are gathered as units, besides the rest of the model: each block, and embedding and head unless
    they are tied."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = len({id(p) for module in ends for p in module.parameters()}) < len(ends)
    return [*blocks(model), *([] if tied else ends)]


def device_mesh(world: World, replicas: int) -> DeviceMesh:
    """(shard,) over all processes, or (replicate, shard) with `replicas` groups."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
