"""Work that one process does for all: layers are dealt out, and the results go to every process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrtrain.distributed.sharding import gathered

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
Values = dict[str, Tensor]


def dealt(names: Sequence[str], compute: Callable[[str], Values]) -> Iterator[tuple[str, Values]]:
    """(name, compute(name)) for all names on every process; each is computed by one, and sent to the others."""
    dist_rank, size = _place()
    for turn in _turns(names, size):
        yield from _shared(turn, compute(turn[dist_rank]) if dist_rank < len(turn) else None)


def dealt_layers(
    layers: Mapping[str, M], compute: Callable[[str, T], Values], gather: Callable[[M, int], T | None] = gathered
) -> Iterator[tuple[str, Values]]:
    """(name, compute(name, layer)) for all layers on every process, the layer being a whole twin (see `gathered`), or
    what else `gather(layer, owner)` makes of it on the process `owner`.

    A collective. Each layer is made whole for one process only, so a process holds one whole layer at the most.
    """
    dist_rank, size = _place()
    for turn in _turns([*layers], size):
        mine = None
        for owner, name in enumerate(turn):
            found = gather(layers[name], owner)
            mine = mine if found is None else found
        values = compute(turn[dist_rank], mine) if mine is not None else None
        del mine
        yield from _shared(turn, values)


def as_tensors(numbers: Mapping[str, float]) -> Values:
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def as_numbers(values: Values) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def _place() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _turns(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """A name for each process, until there are none left."""
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _shared(turn: Sequence[str], mine: Values | None) -> Iterator[tuple[str, Values]]:
    """Each name of a turn with the values that the process at its place computed."""
    dist_rank, size = _place()
    for owner, name in enumerate(turn):
        values = mine if owner == dist_rank else None
        yield name, values if size == 1 and values is not None else _from_owner(values, owner)


def _from_owner(values: Values | None, owner: int) -> Values:
    """The named tensors of process `owner`, on every process; the others give None.

    Numbers travel with the names: a message for each would take longer than to compute most of them."""
    box: list[Any] = [values and {name: _announced(tensor) for name, tensor in values.items()}]
    dist.broadcast_object_list(box, src=owner)
    received = {}
    for name, announced in (box[0] or {}).items():
        if isinstance(announced, Tensor):
            received[name] = announced
            continue
        shape, dtype, device = announced
        received[name] = values[name].contiguous() if values else torch.empty(shape, dtype=dtype, device=device)
        wire = received[name]
        dist.broadcast(wire.view(torch.uint8) if wire.dtype == torch.uint16 else wire, src=owner)  # gloo has no uint16
    return received


def _announced(tensor: Tensor) -> Tensor | tuple[torch.Size, torch.dtype, str]:
    number = tensor.ndim == 0 and tensor.device.type == "cpu"
    return tensor if number else (tensor.shape, tensor.dtype, tensor.device.type)
