"""Work on whole matrices, one layer per rank at a time: the owner of a layer computes and broadcasts its result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrtrain.distributed.sharding import gathered

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
Values = dict[str, Tensor]


def compute_across_ranks(names: Sequence[str], compute: Callable[[str], Values]) -> Iterator[tuple[str, Values]]:
    """(name, compute(name)) for all names on every rank; one rank computes each and broadcasts it. A collective."""
    dist_rank, size = _rank_and_size()
    for batch in _batches(names, size):
        yield from _broadcast_batch(batch, compute(batch[dist_rank]) if dist_rank < len(batch) else None)


def compute_layers_across_ranks(
    layers: Mapping[str, M], compute: Callable[[str, T], Values], gather: Callable[[M, int], T | None] = gathered
) -> Iterator[tuple[str, Values]]:
    """(name, compute(name, layer)) for all layers on every rank; one rank computes each and broadcasts it.

    A collective. A layer is gathered on its owner only, so no rank holds more than one whole layer.

    Args:
        gather: (layer, owner) → what `compute` gets on rank `owner`, None on the others; a collective.
    """
    dist_rank, size = _rank_and_size()
    for batch in _batches([*layers], size):
        mine = None
        for owner, name in enumerate(batch):
            found = gather(layers[name], owner)
            mine = mine if found is None else found
        values = compute(batch[dist_rank], mine) if mine is not None else None
        del mine
        yield from _broadcast_batch(batch, values)


def as_tensors(numbers: Mapping[str, float]) -> Values:
    return {name: torch.tensor(number, dtype=torch.float64) for name, number in numbers.items()}


def as_numbers(values: Values) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def _rank_and_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _batches(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The names, `size` at a time: rank i owns the i-th of each batch."""
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _broadcast_batch(batch: Sequence[str], mine: Values | None) -> Iterator[tuple[str, Values]]:
    """Each name of a batch with the values that its owner computed."""
    dist_rank, size = _rank_and_size()
    for owner, name in enumerate(batch):
        values = mine if owner == dist_rank else None
        yield name, values if size == 1 and values is not None else _broadcast(values, owner)


def _broadcast(values: Values | None, owner: int) -> Values:
    """Rank `owner`'s named tensors, on every rank; the others pass None.

    Scalars are sent with the names: a broadcast for each would take longer than computing most of them."""
    box: list[Any] = [values and {name: _header(tensor) for name, tensor in values.items()}]
    dist.broadcast_object_list(box, src=owner)
    received = {}
    for name, header in (box[0] or {}).items():
        if isinstance(header, Tensor):
            received[name] = header
            continue
        shape, dtype, device = header
        received[name] = values[name].contiguous() if values else torch.empty(shape, dtype=dtype, device=device)
        wire = received[name]
        dist.broadcast(wire.view(torch.uint8) if wire.dtype == torch.uint16 else wire, src=owner)  # gloo has no uint16
    return received


def _header(tensor: Tensor) -> Tensor | tuple[torch.Size, torch.dtype, str]:
    """A CPU scalar itself; for other tensors shape, dtype and device, to allocate a receive buffer."""
    scalar = tensor.ndim == 0 and tensor.device.type == "cpu"
    return tensor if scalar else (tensor.shape, tensor.dtype, tensor.device.type)
