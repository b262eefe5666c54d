"""Models whose layers take on smaller ranks while they train.

No engine can change a parameter's shape in place: the model is built anew with the ranks that its layers want, and
takes over the leading part of every parameter and of every moment of the optimizer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrtrain.distributed.flat_shard import placed_alike
from lrtrain.distributed.per_layer import compute_layers_across_ranks
from lrtrain.distributed.sharding import keep_shard, local, whole
from lrtrain.layers.base import FactorizedLinear
from lrtrain.optim.base import ShardedOptimizer


@torch.no_grad()
def wanted_ranks(layers: Mapping[str, FactorizedLinear], step: int) -> dict[str, int]:
    """The rank that each layer wants when `step` steps are done, its own where it is not due; a collective."""
    due = {name: layer for name, layer in layers.items() if layer.resize_due(step)}
    wanted = compute_layers_across_ranks(due, lambda _, layer: {"rank": torch.tensor(layer.wanted_rank())})
    return {name: layer.rank for name, layer in layers.items()} | {name: int(v["rank"]) for name, v in wanted}


@torch.no_grad()
def carry_over(
    old: nn.Module, old_optimizer: ShardedOptimizer, new: nn.Module, new_optimizer: ShardedOptimizer
) -> None:
    """Fill a model and its optimizer with the leading part of each tensor of another of the same names; a collective.

    Parameters and moments may be sharded. Moments follow their parameter's shape and step counters stay;
    only where an optimizer keeps a state in another form (quantized, factored) does a cut parameter's begin anew.
    """
    buffers = dict(old.named_buffers())
    for name, buffer in new.named_buffers():
        _keep_leading(buffer, buffers[name])
    parameters = dict(old.named_parameters())
    for name, parameter in new.named_parameters():
        before = parameters[name]
        _keep_leading(parameter, before)
        if parameter not in new_optimizer.state:  # frozen
            continue
        state = old_optimizer.state[before]
        if placed_alike(parameter, before):
            new_optimizer.state[parameter] = state
        elif all(v.ndim == 0 or (v.shape == before.shape and v.is_floating_point()) for v in state.values()):
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
    if placed_alike(new, old):
        local(new).copy_(local(old))
    else:
        keep_shard(new, whole(old)[tuple(map(slice, new.shape))])
