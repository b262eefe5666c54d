"""Sharded data parallelism by torch's FSDP2, block by block: one copy of the model over all processes (FSDP), over each
group of processes (HSDP), or on each process (DDP)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from lrtrain.config.dtypes import DTYPES, Dtype
from lrtrain.config.schema import Config
from lrtrain.distributed.tokens import TokenGroup
from lrtrain.distributed.world import World
from lrtrain.engine.base import Engine, Spread
from lrtrain.engine.tensor import cut_parameters, split_computation
from lrtrain.engine.tensor_checks import check_model_split, check_split
from lrtrain.errors import ConfigError
from lrtrain.model.init import materialize
from lrtrain.model.structure import blocks


class FSDPEngine(Engine):
    """FSDP2 over all processes.

    Args:
        replicas: number of groups that each hold the whole model; divides the number of processes.
        tensor: number of processes that split each layer; see `lrtrain.engine.tensor`.
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
        tensor: PositiveInt,
        reduce_dtype: Dtype,
    ):
        super().__init__(world, dtype, compile, recompute_every, recompute_keep)
        self.mesh = device_mesh(world, replicas)
        self.split_mesh = split_mesh(world, replicas, tensor) if tensor > 1 else None
        self.reduce_dtype = DTYPES[reduce_dtype]

    @classmethod
    def check(cls, config: Config, world_size: int) -> None:
        replicas = config.engine.get("replicas", 1)
        if world_size % replicas:
            raise ConfigError(f"engine.replicas={replicas} does not divide the {world_size} processes")
        if config.engine.get("tensor", 1) > 1:
            check_split(config, world_size // replicas)

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        super().check_model(config, model)
        if config.engine.get("tensor", 1) > 1:
            check_model_split(config, model)

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
        options: dict[str, Any] = {"mesh": self.mesh, "mp_policy": policy, "shard_placement_fn": self._split(model)}
        head, in_loss = model.get_output_embeddings(), self.loss.head
        units = [in_loss if in_loss is not None and unit is head else unit for unit in sharded_units(model)]
        for unit in units:
            kept = unit is head or unit is in_loss  # its backward pass comes next
            own = fully_shard(unit, reshard_after_forward=not kept, **options)
            own.set_unshard_in_backward(not isinstance(unit, nn.Embedding))  # its gradient needs no weight
        # The root also reaches the head's parameters through the model's own head, which is not wrapped.
        elsewhere = {*in_loss.parameters()} if in_loss in units else None
        fully_shard(self.loss, ignored_params=elsewhere, **options)
        for module in self._sharded():
            module.set_gradient_divide_factor(1.0)  # sum the gradients: the loss is divided by all tokens already
            module.set_force_sum_reduction_for_comms(True)
            module.register_forward_hook(_reshard_without_gradient)  # pyright: ignore[reportAttributeAccessIssue]

    def _split(self, model: PreTrainedModel) -> Callable[[nn.Parameter], ShardPlacementResult | None] | None:
        """Split layers over the innermost dimension of `split_mesh`; returns how FSDP2 is to shard each parameter: cut
        ones over the other dimensions of that mesh, others (None) over all processes of a replica."""
        if self.split_mesh is None:
            return None
        parts = self.split_mesh["tensor"]
        others = self.split_mesh["shard" if self.split_mesh.ndim == 2 else ("replicate", "shard")]
        cut_parameters(
            model, parts.size(), lambda part, dim: DTensor.from_local(part, parts, [Shard(dim)], run_check=False)
        )
        split_computation(self.loss, TokenGroup(parts.get_group()))
        mesh_info = HSDPMeshInfo(others, 1, 0) if others.ndim == 2 else FSDPMeshInfo(others, 0)
        over_others = ShardPlacementResult(Shard(0), mesh_info)
        return lambda p: over_others if isinstance(p, DTensor) else None

    def _sharded(self) -> list[FSDPModule]:
        return [module for module in self.loss.modules() if isinstance(module, FSDPModule)]

    def forward_backward(self, rows: Tensor, tokens: int, last: bool = True) -> Tensor:
        if isinstance(self.loss, FSDPModule):
            self.loss.set_requires_all_reduce(last)  # across replicas once per step; within a replica every micro-batch
        losses = self.loss(rows.to(self.world.device, non_blocking=True))
        if self.in_backward is not None:
            self.in_backward.loss_finite = self._finite_everywhere(losses[0].detach())
        (losses[0] / tokens).backward()
        return losses.detach()

    def _finite_everywhere(self, loss: Tensor) -> Tensor:
        """Whether the loss is finite on all processes, on the device."""
        total = loss.clone()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total.isfinite()


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
        super().__init__(world, dtype, compile, recompute_every, recompute_keep, world.size, 1, reduce_dtype)

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


def split_mesh(world: World, replicas: int, tensor: int) -> DeviceMesh:
    """(shard, tensor), or (replicate, shard, tensor) with `replicas` groups."""
    shape, names = (world.size // replicas // tensor, tensor), ("shard", "tensor")
    if replicas > 1:
        shape, names = (replicas, *shape), ("replicate", *names)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)
