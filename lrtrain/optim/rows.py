"""Matrices whose rows lie on several processes, as FSDP2 shards them, and the sums that optimizers need over them."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lrtrain.distributed.flat_shard import FlatShard
from lrtrain.distributed.sharding import local


class Rows:
    """This process's rows of a parameter, among those of the processes that share its shards.

    The collectives reduce in place and must be called by all of these processes, those without any rows too.
    """

    def __init__(self, parameter: Tensor):
        self.shape = parameter.shape
        """Of the whole parameter."""
        self.group: dist.ProcessGroup | None = None
        """Of the processes that hold the other rows; None if there are none."""
        self.index = 0
        """This process's place among them."""
        if isinstance(parameter, FlatShard):  # whose rows may be cut: of use are the sums alone
            self.group, self.index = dist.group.WORLD, dist.get_rank()
        elif isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            sharded = [dim for dim, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
            if sharded and mesh.size(sharded[0]) > 1:
                self.group = mesh.get_group(sharded[0])
                self.index = mesh.get_local_rank(sharded[0])

    @property
    def most(self) -> int:
        """How many rows a process has, but for the last ones: as torch.chunk cuts."""
        return -(-self.shape[0] // self.processes)

    @property
    def first(self) -> int:
        """Which row of the whole parameter is the first one here."""
        return min(self.shape[0], self.index * self.most)

    @property
    def processes(self) -> int:
        return dist.get_world_size(self.group) if self.group is not None else 1

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all processes' `part`."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part

    def largest(self, part: Tensor) -> Tensor:
        """The elementwise maximum of all processes' `part`."""
        if self.group is not None:
            dist.all_reduce(part, op=dist.ReduceOp.MAX, group=self.group)
        return part

    def gather(self, rows: Tensor) -> Tensor:
        """The whole (m, …) of which each process gives its own rows."""
        if self.group is None:
            return rows
        padded = rows.new_zeros(self.most, *rows.shape[1:])
        padded[: len(rows)] = rows
        whole = rows.new_empty(self.most * self.processes, *rows.shape[1:])
        dist.all_gather_single(whole, padded, group=self.group)
        return whole[: self.shape[0]]

    def cut(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole (m, …)."""
        return whole[self.first : self.first + self.most]


def rows_like(parameter: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor (m, *shape) of zeros whose rows lie where the rows of the parameter (m, …) do."""
    if isinstance(parameter, FlatShard):
        assert shape == parameter.shape[1:], "a parameter that is cut anywhere has no rows"
        return parameter.with_part(torch.zeros_like(local(parameter), dtype=dtype))
    part = local(parameter)
    here = torch.zeros(part.shape[0], *shape, dtype=dtype, device=part.device)
    if not isinstance(parameter, DTensor):
        return here
    size = torch.Size((parameter.shape[0], *shape))
    stride = torch.empty(size, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(here, mesh, placements, run_check=False, shape=size, stride=stride)


def in_pieces(rows: Tensor) -> list[slice]:
    """Slices over the rows for elementwise work with temporaries: on a CPU so small that these stay in its cache."""
    entries = 2**19 if rows.device.type == "cpu" else 2**24
    most = max(1, entries // max(1, rows[:1].numel()))
    return [slice(start, start + most) for start in range(0, len(rows), most)]
