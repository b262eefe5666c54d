"""Where DeepSpeed's ZeRO keeps a parameter's values: the only file that uses DeepSpeed's private attributes."""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrtrain.distributed.flat_shard import FlatShard
from lrtrain.distributed.world import World


def import_deepspeed(world: World) -> ModuleType:
    """Import DeepSpeed, which takes seconds, with its messages silenced."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)  # DeepSpeed uses them
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if world.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # DeepSpeed would compile a shared-memory all-reduce
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP not in dist.distributed_c10d._world.pg_map:
        groups._WORLD_GROUP = None  # of an earlier run in this process
    return deepspeed


def allocate(
    model: PreTrainedModel, device: torch.device, dtype: torch.dtype, deepspeed: ModuleType, cut: dict[str, Any] | None
) -> dict[nn.Module, dict[str, Tensor | None]]:
    """Give a model on meta its storage, parameter by parameter; with `cut` (DeepSpeed's settings) each is sharded
    immediately, so no process holds the whole model. Returns the buffers of each module."""
    init = deepspeed.zero.Init(config_dict_or_path=cut, mem_efficient_linear=False) if cut else None
    made: dict[nn.Parameter, nn.Parameter] = {}
    buffers: dict[nn.Module, dict[str, Tensor | None]] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and p not in made:
                made[p] = nn.Parameter(torch.zeros_like(p, device=device, dtype=dtype), p.requires_grad)
                if init is not None:
                    init._convert_to_zero_parameters([made[p]])
            if p is not None:
                module._parameters[key] = made[p]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty_like(buffer, device=device)
        buffers[module] = dict(module._buffers)
    return buffers


@dataclass(frozen=True)
class FlatRange:
    """A parameter's range within a flat tensor."""

    flat: Tensor
    start: int
    """Of the range within `flat`."""
    shape: torch.Size
    bounds: tuple[int, ...]
    """See FlatShard."""
    trained: bool
    home: torch.device

    @property
    def size(self) -> int:
        here = dist.get_rank()
        return self.bounds[here + 1] - self.bounds[here]

    def shard(self) -> FlatShard:
        """The range, as a parameter."""
        part = self.flat.detach().narrow(0, self.start, self.size)
        return nn.Parameter(self._cut(part), self.trained)  # pyright: ignore[reportReturnType]

    def gradient(self) -> FlatShard:
        """The range of the flat tensor's gradient."""
        assert self.flat.grad is not None
        return self._cut(self.flat.grad.narrow(0, self.start, self.size))

    def gradient_of(self, part: Tensor) -> FlatShard:
        """The range of a gradient that begins with this process's entries."""
        return self._cut(part.view(-1)[: self.size])

    def _cut(self, part: Tensor) -> FlatShard:
        return FlatShard(part, self.shape, self.bounds, self.home)


def flat_ranges(zero: Any, model: nn.Module, stage: int, home: torch.device) -> dict[Tensor, FlatRange]:
    """The range of each sharded parameter; other parameters are whole on every process."""
    return dict(_ranges_of_stage_3(zero, model, home) if stage == 3 else _ranges_of_stage_1_and_2(zero, home))


def _ranges_of_stage_1_and_2(zero: Any, home: torch.device) -> Iterator[tuple[Tensor, FlatRange]]:
    """All trained parameters are concatenated in one tensor, which is divided into equal ranges."""
    here, processes = dist.get_rank(), dist.get_world_size()
    (parameters,), (flat,), (length,) = zero.bit16_groups, zero.single_partition_of_fp32_groups, zero.partition_size
    (offsets,) = zero.round_robin_bit16_offsets
    for p, offset in zip(parameters, offsets, strict=True):
        bounds = tuple(min(max(i * length - offset, 0), p.numel()) for i in range(processes + 1))
        start = min(max(offset - here * length, 0), length)
        yield p, FlatRange(flat, start, p.shape, bounds, True, home)


def _ranges_of_stage_3(zero: Any, model: nn.Module, home: torch.device) -> Iterator[tuple[Tensor, FlatRange]]:
    """Each parameter is divided into equal ranges, padded at the end."""
    processes = dist.get_world_size()
    flats = zero.fp32_partitioned_groups_flat
    p: Any  # a parameter with what DeepSpeed attached to it
    for p in model.parameters():
        bounds = tuple(min(i * p.partition_numel(), p.ds_numel) for i in range(processes + 1))
        if p.requires_grad:
            group, start, _ = zero.grad_position[zero.get_param_id(p)]
            yield p, FlatRange(flats[group], start, p.ds_shape, bounds, True, home)
        else:
            yield p, FlatRange(p.ds_tensor, 0, p.ds_shape, bounds, False, home)


def flat_gradients(zero: Any, of: dict[Tensor, FlatRange], stage: int) -> Iterator[tuple[Tensor, FlatShard]]:
    """This process's part of the gradients after the last backward pass of a step."""
    if zero.offload_optimizer if stage == 3 else zero.cpu_offload:
        yield from ((p, place.gradient()) for p, place in of.items() if place.trained)
        return
    groups = zero.fp16_groups if stage == 3 else zero.params_in_partition
    parts: dict[Tensor, Tensor] = {}
    for i, parameters in enumerate(groups):
        parts |= {p: g for p, g in zip(parameters, zero.averaged_gradients[i], strict=False)}
    for p, place in of.items():
        if place.trained:
            yield p, place.gradient_of(parts[p] if place.size else place.flat.new_empty(0))


@torch.no_grad()
def refresh(zero: Any, stage: int) -> None:
    """Copy the flat float32 parameters into those used by the forward pass; a collective."""
    if stage != 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # otherwise persistent parameters would keep their old values
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if kept := zero.persistent_parameters:
        kept[0].all_gather(kept)
