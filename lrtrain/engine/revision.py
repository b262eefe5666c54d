"""Layers that change between steps: each is revised by one process, the others take over its values."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrtrain.distributed import from_owner
from lrtrain.initialize import generator_for, keep_shard, take_over
from lrtrain.layers.base import FactorizedLinear, Reset, gathered_in_turn, whole
from lrtrain.model import factorized_layers


@torch.no_grad()
def revise_layers(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seed: int) -> None:
    """`FactorizedLinear.revise` for the layers that are due when `step` steps are done, and their resets; a collective.

    Parameters and optimizer states may be sharded (DTensors).
    """
    layers = {name: layer for name, layer in factorized_layers(model).items() if layer.revision_due(step)}
    for name, values in _revised(layers, step, seed):
        take_over(layers[name], values)
    for name, layer in layers.items():
        for key, reset in layer.resets(step).items():
            generator = generator_for(seed, f"{name}.{key}/reset at {step}")
            reset_state(optimizer.state.get(layer.get_parameter(key), {}), reset, generator)


def _revised(layers: Mapping[str, FactorizedLinear], step: int, seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each layer's name and its whole values after the revision."""
    names = [*layers]
    size, dist_rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for start in range(0, len(names), size):
        turn = names[start : start + size]
        mine = gathered_in_turn(layers, turn)
        if mine is not None:
            mine.revise(step, generator_for(seed, f"{turn[dist_rank]}/revision at {step}"))
        for owner, name in enumerate(turn):
            values = _values(mine) if mine is not None and owner == dist_rank else None
            yield name, from_owner(values, owner)


def _values(layer: FactorizedLinear) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    given_by_seed = layer._non_persistent_buffers_set
    buffers = {name: buffer for name, buffer in layer.named_buffers() if name not in given_by_seed}
    return {name: p.data for name, p in layer.named_parameters()} | buffers


def reset_state(state: Mapping[str, Tensor], reset: Reset, generator: torch.Generator) -> None:
    """Prune a parameter's moments, and set its step counter to zero if `reset` says so; in place.

    All moments lose the same entries, chosen by the first moment: where Adam's first one outlived the second, it would
    be divided by eps alone.
    """
    kept = None
    for value in state.values():
        if value.ndim == 0:
            if reset.restart:
                value.zero_()
        elif reset.pruned == 1:
            value.zero_()
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
