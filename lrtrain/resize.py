"""Models whose layers take on smaller ranks while they train.

FSDP cannot change a parameter's shape in place: the model is built anew with the ranks that its layers want, and takes
over the leading part of every parameter and of every moment of the optimizer.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrtrain.initialize import keep_shard
from lrtrain.layers.base import FactorizedLinear, gathered_in_turn, whole


@torch.no_grad()
def wanted_ranks(layers: Mapping[str, FactorizedLinear], step: int) -> dict[str, int]:
    """The rank that each layer wants when `step` steps are done, its own where it is not due; a collective."""
    due = [name for name, layer in layers.items() if layer.resize_due(step)]
    size, dist_rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    wanted = {name: layer.rank for name, layer in layers.items()}
    for start in range(0, len(due), size):
        turn = due[start : start + size]
        mine = gathered_in_turn(layers, turn)
        found = [mine.wanted_rank() if mine is not None else 0]
        if size > 1:
            found = found * size
            dist.all_gather_object(found, found[0])
        wanted.update(zip(turn, found, strict=False))
    return wanted


@torch.no_grad()
def carry_over(
    old: nn.Module, old_optimizer: torch.optim.Optimizer, new: nn.Module, new_optimizer: torch.optim.Optimizer
) -> None:
    """Fill a model and its optimizer with the leading part of each tensor of another of the same names; a collective.

    Parameters and moments may be sharded (DTensors). Moments follow their parameter's shape and step counters stay;
    only where an optimizer keeps a state in another form (quantized, factored) does a cut parameter's begin anew.
    """
    buffers = dict(old.named_buffers())
    for name, buffer in new.named_buffers():
        _keep_leading(buffer, buffers[name])
    parameters = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        before = parameters[name]
        _keep_leading(parameter, before)
        state = old_optimizer.state.get(before, {})
        if parameter.shape == before.shape:
            new_optimizer.state[parameter] = state
        elif all(value.ndim == 0 or value.shape == before.shape for value in state.values()):
            new_optimizer.state[parameter] = {key: _leading(value, parameter) for key, value in state.items()}


def _leading(value: Tensor, parameter: Tensor) -> Tensor:
    """A step counter as it is, or the part of a moment that belongs to what is left of its parameter."""
    if value.ndim == 0:
        return value
    moment = torch.empty_like(parameter, dtype=value.dtype)
    _keep_leading(moment, value)
    return moment


def _keep_leading(new: Tensor, old: Tensor) -> None:
    """Copy the leading part of `old` (of its whole, if it is sharded) into `new`."""
    if new.shape == old.shape:
        _local(new).copy_(_local(old))
    else:
        keep_shard(new, whole(old)[tuple(map(slice, new.shape))])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
