"""Stacks: parameters of one shape that are stepped at once, because a GPU would otherwise wait for kernels' launches.

The states of a stack's members lie next to each other in memory. Each member's state is a view of its part, so that
checkpoints have one tensor per parameter and key.
"""

from collections.abc import Collection, Hashable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lrtrain.distributed.flat_shard import FlatShard
from lrtrain.distributed.sharding import local
from lrtrain.optim.rows import Rows

if TYPE_CHECKING:
    from lrtrain.optim.base import ShardedOptimizer

State = dict[str, Tensor]


class Stack:
    """Parameters, or matrices of batches, that are stepped at once.

    Tensors of a single member are (rows, …), those of several are (members, rows, …).

    Args:
        members: of one shape, dtype and sharding.
        rows: those of each member.
        state: of all members on this process, by key.
    """

    def __init__(self, members: Sequence[Tensor], rows: Rows, state: State):
        self.members = members
        self.rows = rows
        self.state = state

    @property
    def first(self) -> Tensor:
        return self.members[0]

    @property
    def shape(self) -> torch.Size:
        """Shape of each member."""
        return self.first.shape

    @property
    def single(self) -> bool:
        return len(self.members) == 1

    def each(self, tensor: Tensor) -> Sequence[Tensor]:
        """Each member's part of a tensor."""
        return [tensor] if self.single else tensor.unbind()

    def are_zero(self, tensor: Tensor) -> list[bool]:
        """Whether each member's part of a tensor is zero in the rows of all processes; a collective."""
        nonzero = torch.stack([part.any() for part in self.each(tensor)]).float()
        return [not count for count in self.rows.sum(nonzero).tolist()]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `each`."""
        return parts[0] if self.single else torch.stack([*parts])


def stacked_states(optimizer: "ShardedOptimizer") -> dict[Tensor, Stack]:
    """Stacks of the parameters, and matrices of batches, that are alike, by member; their states become views."""
    found: dict[Tensor, Stack] = {}
    for group in optimizer.param_groups:
        kinds: dict[Hashable, list[Tensor]] = {}
        for p in group["params"]:
            several = p not in optimizer.own or optimizer.elementwise or optimizer.stacked
            in_parts = isinstance(p, FlatShard) or optimizer.rows[p].column_group is not None  # of rows
            if several and not (optimizer.fused(p) or in_parts) and optimizer.items(p):
                item = optimizer.items(p)[0]
                kind = (item.shape, p.dtype, p in optimizer.own, optimizer.rows[item].group, optimizer.alike(p))
                kinds.setdefault(kind, []).append(p)
        for alike in kinds.values():
            items, first = {p: optimizer.items(p) for p in alike}, optimizer.items(alike[0])[0]
            found |= stacks_of(items, optimizer.state, optimizer.rows[first], optimizer.entries(first))
    return found


def present_stacks(optimizer: "ShardedOptimizer", items: Collection[Tensor]) -> list[Stack]:
    """The stacks of these items; an item is alone if others of its stack are absent, or have other step counts."""
    here, found = set(items), dict[Tensor, Stack]()
    for item in items:
        stack = optimizer.stacks.get(item)
        if stack is not None and found.get(stack.first) is stack:
            continue
        if stack is None or not here.issuperset(stack.members) or len({*stack.state["step"].tolist()}) > 1:
            stack = optimizer.alone(item)
        found[stack.first] = stack
    return [*found.values()]


def entries_at_once(device: torch.device) -> int:
    """The number of entries that are stepped at once. Elementwise work on a CPU is fastest within its cache; on a GPU
    the limit bounds the memory of temporary results, to about 3 GB."""
    return 0 if device.type in ("cpu", "meta") else 2**27


def stacks_of(
    items: Mapping[Tensor, Sequence[Tensor]], states: MutableMapping[Tensor, State], rows: Rows, entries: int
) -> dict[Tensor, Stack]:
    """Stacks of as many items as `entries_at_once` allows, by member.

    Args:
        items: of each parameter: the parameter, or the matrices of a batch.
        states: of the parameters; their tensors become views.
        rows: those of each item.
        entries: of each item, on each process.
    """
    members = [item for of in items.values() for item in of]
    most = entries_at_once(members[0].device) // max(1, entries)
    if min(most, len(members)) < 2:
        return {}
    state = _laid_together(items, states)
    found: dict[Tensor, Stack] = {}
    for start in range(0, len(members), most):
        some = slice(start, start + most)
        if len(members[some]) > 1:
            stack = Stack(members[some], rows, {key: value[some] for key, value in state.items()})
            found |= dict.fromkeys(stack.members, stack)
    return found


def _laid_together(items: Mapping[Tensor, Sequence[Tensor]], states: MutableMapping[Tensor, State]) -> State:
    """One tensor (members, …) per key for the states of all parameters, whose tensors become views of it."""
    single = {p: of[0] is p for p, of in items.items()}
    found: State = {}
    for key in states[next(iter(items))]:
        parts = [local(states[p][key])[None] if single[p] else local(states[p][key]) for p in items]
        found[key] = torch.cat(parts)
        for p, view in zip(items, found[key].split([len(part) for part in parts]), strict=True):
            states[p][key] = _with_part(states[p][key], view[0] if single[p] else view)
    return found


def _with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor that is sharded like another, with this part on this process."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
