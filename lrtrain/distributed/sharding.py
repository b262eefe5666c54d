"""Sharded tensors: local part, unsharded tensor, and copying unsharded values into shards."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lrtrain.distributed.flat_shard import FlatShard


def take_over(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy unsharded values, by name, into the module's parameters (each process keeps its shards) and buffers."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    for key, value in values.items():
        keep_shard(state[key], value)


def keep_shard(parameter: Tensor, value: Tensor) -> None:
    """Copy this process's part of the unsharded `value` into the parameter (or moment, or buffer); no communication."""
    if isinstance(parameter, FlatShard):
        parameter.to_local().copy_(parameter.cut(value))
    elif isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        value = value.detach().to(parameter.device)
        whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.to_local().copy_(whole.redistribute(mesh, parameter.placements).to_local())
    else:
        parameter.copy_(value)


def shard_dimensions(tensor: DTensor) -> list[int]:
    """The dimensions of the mesh that a tensor is sharded over."""
    return [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]


M = TypeVar("M", bound=nn.Module)


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor (a collective if it is sharded), detached."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor | FlatShard) else tensor).detach()


def local(tensor: Tensor) -> Tensor:
    """This process's shard: rows, or a range of entries (1-D)."""
    return tensor.to_local() if isinstance(tensor, DTensor | FlatShard) else tensor


def twin(module: M, tensor_for: Callable[[Tensor], Tensor | None]) -> M:
    """A twin of the module with other tensors in place of its parameters (not trained unless they are parameters);
    buffers are shared with the original."""
    changed = {name: p if p is None else tensor_for(p) for name, p in module._parameters.items()}
    found = object.__new__(type(module))  # not copy.copy, which calls the constructor of FSDP's classes
    found.__dict__ = dict(module.__dict__)
    found._parameters = {
        name: t if t is None or isinstance(t, nn.Parameter) else nn.Parameter(t, requires_grad=False)
        for name, t in changed.items()
    }
    found._modules = {name: child and twin(child, tensor_for) for name, child in module._modules.items()}
    return found


def gathered(module: M, owner: int) -> M | None:
    """A twin of the module with unsharded plain tensors as parameters on process `owner`; None on the others.

    A collective of all processes of the mesh. Buffers are shared with the original; the twin is not trained.
    """
    found = twin(module, lambda p: whole_at(p, owner))
    return found if owner == (dist.get_rank() if dist.is_initialized() else 0) else None


def whole_at(tensor: Tensor, owner: int) -> Tensor | None:
    """The unsharded tensor on process `owner`, detached; None on the others, which never hold more than their shards.

    A collective of each group. Shards are along dimension 0 and the last dimension of the mesh (FSDP2), or ranges of
    entries (ZeRO). Tensors cut over several dimensions of the mesh (`engine.tensor`) are gathered everywhere.
    """
    if isinstance(tensor, FlatShard):
        return tensor.gathered_at(owner)
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if len(shard_dimensions(tensor)) > 1:
        found = whole(tensor)
        return found if owner == dist.get_rank() else None
    group = tensor.device_mesh.get_group(-1)
    members = dist.get_process_group_ranks(group)
    if owner not in members:
        return None
    rows = -(-tensor.shape[0] // len(members))  # per shard, except for the last ones
    mine = tensor.to_local().detach()
    padded = mine.new_zeros(rows, *tensor.shape[1:])
    padded[: len(mine)] = mine
    if owner != dist.get_rank():
        dist.gather(padded.view(torch.uint8), dst=owner, group=group)
        return None
    found = mine.new_empty(len(members), rows, *tensor.shape[1:])
    dist.gather(padded.view(torch.uint8), [part.view(torch.uint8) for part in found], owner, group)
    return found.flatten(0, 1)[: tensor.shape[0]]
