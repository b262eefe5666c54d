"""Revisions of layers between steps (merges, SVDs): one process computes each and broadcasts the values."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrtrain.core.seeds import generator_for
from lrtrain.distributed.per_layer import compute_layers_across_ranks
from lrtrain.distributed.sharding import keep_shard, local, take_over, whole
from lrtrain.layers.base import FactorizedLinear, Reset
from lrtrain.model.structure import factorized_layers
from lrtrain.optim.base import ShardedOptimizer


@torch.no_grad()
def revise_layers(model: nn.Module, optimizer: ShardedOptimizer, step: int, seed: int) -> bool:
    """Call `FactorizedLinear.revise` for the layers that are due after `step` steps, and reset their optimizer state.

    A collective. Parameters and optimizer state may be sharded (DTensors). Returns whether any layer was due.
    """
    layers = {name: layer for name, layer in factorized_layers(model).items() if layer.revision_due(step)}

    def revised(name: str, layer: FactorizedLinear) -> dict[str, Tensor]:
        layer.float().revise(step, generator_for(seed, f"{name}/revision at {step}"))  # whatever the parameters' dtype
        return _values(layer)

    for name, values in compute_layers_across_ranks(layers, revised):
        take_over(layers[name], values)
    for name, layer in layers.items():
        for key, reset in layer.resets(step).items():
            parameter = layer.get_parameter(key)
            if parameter.requires_grad:
                generator = generator_for(seed, f"{name}.{key}/reset at {step}")
                reset_parameter(optimizer, parameter, reset, generator)
    return bool(layers)


def _values(layer: FactorizedLinear) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    given_by_seed = layer._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in layer.named_buffers() if name not in given_by_seed}
    return {name: p.data for name, p in layer.named_parameters()} | buffers


def reset_parameter(optimizer: ShardedOptimizer, p: Tensor, reset: Reset, generator: torch.Generator) -> None:
    """`reset_state` of a parameter; state that is not in moments of its shape is initialized again."""
    state = optimizer.state[p]
    if all(value.ndim == 0 or (value.shape == p.shape and value.is_floating_point()) for value in state.values()):
        reset_state(state, reset, generator)
        return
    optimizer.initialize_state(p)


def reset_state(state: Mapping[str, Tensor], reset: Reset, generator: torch.Generator) -> None:
    """Prune a parameter's moments, and zero its step counter if `reset` asks for it; in place.

    All moments lose the same entries, chosen by the first moment: a first moment without its second moment would be
    divided by eps alone.
    """
    kept = None
    for value in state.values():
        if value.ndim == 0:
            if reset.restart:
                value.zero_()
        elif reset.pruned == 1:
            local(value).zero_()
        else:
            moment = whole(value)
            kept = _kept(moment, reset, generator) if kept is None else kept
            keep_shard(value, torch.where(kept, moment, 0))


def _kept(moment: Tensor, reset: Reset, generator: torch.Generator) -> Tensor:
    """Which entries survive."""
    if reset.by == "random":
        return (torch.rand(moment.shape, generator=generator) >= reset.pruned).to(moment.device)
    size = moment.abs()
    pruned = int(reset.pruned * size.numel())
    return size > size.flatten().kthvalue(pruned).values if pruned else torch.ones_like(size, dtype=torch.bool)
