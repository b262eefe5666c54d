"""Matrices with rows sharded over processes (FSDP2), and the collectives that optimizers need over them."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lrtrain.distributed.flat_shard import FlatShard
from lrtrain.distributed.sharding import local, shard_dimensions


class Rows:
    """The rows of a parameter that this process holds, and collectives over the processes that hold the others.

    The collectives reduce in place and must be called by all of these processes, including those without rows.
    """

    def __init__(self, parameter: Tensor):
        self.shape = parameter.shape
        """Shape of the unsharded parameter."""
        self.group: dist.ProcessGroup | None = None
        """The processes that hold the rows; None if this process holds all of them."""
        self.column_group: dist.ProcessGroup | None = None
        """With `engine.tensor`, where this process has a part of a tensor's rows or columns (only the sums are
        meaningful): the processes that have the other parts of it."""
        self.index = 0
        """This process's index in the group."""
        if isinstance(parameter, FlatShard):  # may hold partial rows: only the sums are meaningful
            self.group, self.index = dist.group.WORLD, dist.get_rank()
        elif isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            sharded = shard_dimensions(parameter)
            if sharded and mesh.size(sharded[0]) > 1:
                self.group = mesh.get_group(sharded[0])
                self.index = mesh.get_local_rank(sharded[0])
            if len(sharded) > 1:
                self.column_group = mesh.get_group(sharded[1])

    @property
    def most(self) -> int:
        """The number of rows per process, except for the last ones (as torch.chunk splits)."""
        return -(-self.shape[0] // self.processes)

    @property
    def first(self) -> int:
        """The index of this process's first row in the unsharded parameter."""
        return min(self.shape[0], self.index * self.most)

    @property
    def processes(self) -> int:
        return dist.get_world_size(self.group) if self.group is not None else 1

    @property
    def holders(self) -> int:
        """The number of processes that the parts of a tensor are spread over, each on one."""
        return math.prod(dist.get_world_size(group) for group in self._groups())

    def sum(self, part: Tensor) -> Tensor:
        """All-reduce (sum) of `part`."""
        for group in self._groups():
            dist.all_reduce(part, group=group)
        return part

    def max(self, part: Tensor) -> Tensor:
        """All-reduce (elementwise maximum) of `part`."""
        for group in self._groups():
            dist.all_reduce(part, op=dist.ReduceOp.MAX, group=group)
        return part

    def _groups(self) -> list[dist.ProcessGroup]:
        return [group for group in (self.group, self.column_group) if group is not None]

    def gather(self, rows: Tensor) -> Tensor:
        """All-gather: the unsharded ([matrices,] m, n) from each process's rows ([matrices,] rows, n)."""
        if self.group is None:
            return rows
        padded = F.pad(rows, (0, 0, 0, self.most - rows.shape[-2]))
        found = rows.new_empty(self.processes * len(padded), *padded.shape[1:])
        dist.all_gather_single(found, padded, group=self.group)
        return found.view(self.processes, *padded.shape).movedim(0, -3).flatten(-3, -2)[..., : self.shape[0], :]

    def cut(self, whole: Tensor) -> Tensor:
        """This process's rows of an unsharded (m, …), or of several (matrices, m, …)."""
        here = slice(self.first, self.first + self.most)
        return whole[here] if whole.ndim == len(self.shape) else whole[:, here]


def rows_like(parameter: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros (m, *shape), sharded like the rows of the parameter (m, …)."""
    if isinstance(parameter, FlatShard):
        assert shape == parameter.shape[1:], "a FlatShard has no whole rows"
        return parameter.with_part(torch.zeros_like(local(parameter), dtype=dtype))
    part = local(parameter)
    columns = part.shape[1:] if shape == parameter.shape[1:] else shape
    here = torch.zeros(part.shape[0], *columns, dtype=dtype, device=part.device)
    if not isinstance(parameter, DTensor):
        return here
    size = torch.Size((parameter.shape[0], *shape))
    stride = torch.empty(size, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(here, mesh, placements, run_check=False, shape=size, stride=stride)


def in_pieces(rows: Tensor) -> list[slice]:
    """Slices over the rows for elementwise work; on a CPU small enough for temporaries to stay in its cache."""
    entries = 2**19 if rows.device.type == "cpu" else 2**27
    most = max(1, entries // max(1, rows[:1].numel()))
    return [slice(start, start + most) for start in range(0, len(rows), most)]
