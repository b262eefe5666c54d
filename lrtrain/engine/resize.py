"""Shrinking the ranks of a model's layers during training.

No engine can change a parameter's shape in place: the model is rebuilt with the ranks that its layers want, and
gets the leading part of every parameter and of every moment of the optimizer.
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
    """The rank that each layer wants after `step` steps (its current rank if it is not due); a collective."""
    due = {name: layer for name, layer in layers.items() if layer.resize_due(step)}
    wanted = compute_layers_across_ranks(due, lambda _, layer: {"rank": torch.tensor(layer.wanted_rank())})
    return {name: layer.rank for name, layer in layers.items()} | {name: int(v["rank"]) for name, v in wanted}


@torch.no_grad()
def carry_over(
    old: nn.Module, old_optimizer: ShardedOptimizer, new: nn.Module, new_optimizer: ShardedOptimizer
) -> None:
    """Copy the leading part of each tensor of a model and its optimizer into a smaller model; a collective.

    Parameters and moments may be sharded. Moments shrink like their parameter, and step counters are kept. State in
    another form (quantized, projected) is reset for a parameter that shrinks.
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
    """The unchanged step counter, or the leading part of a moment, in the shape of its parameter."""
    if value.ndim == 0:
        return value
    moment = torch.empty_like(parameter, dtype=value.dtype)
    _keep_leading(moment, value)
    return moment


def _keep_leading(new: Tensor, old: Tensor) -> None:
    """Copy the leading part of the unsharded `old` into `new`; a collective if they are sharded."""
    if placed_alike(new, old):
        local(new).copy_(local(old))
    else:
        keep_shard(new, whole(old)[tuple(map(slice, new.shape))])
