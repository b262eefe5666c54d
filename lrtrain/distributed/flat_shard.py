"""Tensors sharded by ranges of entries, for ZeRO's partitions, as DTensors are for FSDP2's shards.

A process has a range of the tensor's entries in row-major order. Checkpoints store rectangles; a range of a
matrix is at most three: the end of a row, whole rows, the beginning of a row. So a FlatShard is saved and loaded in the
same form under all engines, and no process ever holds more than its range.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

aten = torch.ops.aten


class FlatShard(Tensor):
    """A tensor of which each process has a range of entries.

    It has the unsharded tensor's shape but no arithmetic: see `local`, `whole` and `whole_at` of
    distributed/sharding.py.

    Args:
        part: this process's entries, 1-D: a view of their storage.
        shape: shape of the unsharded tensor.
        bounds: process i has the entries bounds[i] … bounds[i+1] − 1.
        home: the device of unsharded tensors; the part may be offloaded to host memory.
    """

    part: Tensor
    bounds: tuple[int, ...]
    home: torch.device

    @staticmethod
    def __new__(cls, part: Tensor, shape: Sequence[int], bounds: tuple[int, ...], home: torch.device) -> "FlatShard":
        made = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=part.dtype, device=part.device)
        made.part, made.bounds, made.home = part.detach(), bounds, home
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"FlatShard({tuple(self.shape)}, {self.part.numel()} entries here)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> "FlatShard":
        kwargs = kwargs or {}
        if func is aten.detach.default:
            return args[0].with_part(args[0].part)
        if func is aten.clone.default:
            return args[0].with_part(args[0].part.clone())
        if func in (aten.empty_like.default, aten.new_empty.default):  # always of the same shape
            options = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
            return args[0].with_part(torch.empty_like(args[0].part, **options))
        raise NotImplementedError(f"{func} of a FlatShard: use its local part or the whole tensor")

    def with_part(self, part: Tensor) -> "FlatShard":
        """Another tensor of this shape, sharded in the same way."""
        return FlatShard(part, self.shape, self.bounds, self.home)

    @property
    def first(self) -> int:
        """The index of this process's first entry in the unsharded tensor."""
        return self.bounds[dist.get_rank()]

    def to_local(self) -> Tensor:
        """This process's entries (1-D), not a copy."""
        return self.part

    def cut(self, whole: Tensor) -> Tensor:
        """This process's entries (1-D) of an unsharded tensor."""
        return whole.reshape(-1)[self.first : self.first + self.part.numel()].to(self.part.device)

    def full_tensor(self) -> Tensor:
        """The unsharded tensor; a collective."""
        padded = self._padded()
        found = padded.new_empty(len(padded) * (len(self.bounds) - 1))
        dist.all_gather_single(found, padded)
        return self._joined([*found.split(len(padded))])

    def gathered_at(self, owner: int) -> Tensor | None:
        """The unsharded tensor on process `owner`, None on the others; a collective."""
        padded = self._padded()
        parts = [torch.empty_like(padded) for _ in self.bounds[1:]] if owner == dist.get_rank() else None
        dist.gather(padded, parts, dst=owner)
        return None if parts is None else self._joined(parts)

    def _padded(self) -> Tensor:
        """The part, padded to the length of the longest one."""
        most = max(end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))
        padded = self.part.new_zeros(most)
        padded[: self.part.numel()] = self.part
        return padded

    def _joined(self, parts: list[Tensor]) -> Tensor:
        sizes = (end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.to(self.home).view(self.shape)

    # --- the interface of torch.distributed.checkpoint
    # --------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        last = self.first + self.part.numel()
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in rectangles(self.shape, self.first, last)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        start = self.first
        for chunk in self.__create_chunk_list__():
            size = math.prod(chunk.sizes)
            if chunk.offsets == index.offset:
                return self.part.narrow(0, start - self.first, size).view(chunk.sizes)
            start += size
        raise ValueError(f"{index.fqn} has nothing here at {index.offset}")


def rectangles(shape: Sequence[int], first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The entries first … last − 1 in row-major order of a tensor of this shape, as (offsets, sizes) in that order."""
    if first >= last:
        return
    if len(shape) <= 1:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    size = math.prod(shape[1:])
    begin, end = -(-first // size), last // size  # whole rows
    if begin > end:  # a range within one row
        yield from _in_row(shape, end, first - end * size, last - end * size)
        return
    yield from _in_row(shape, begin - 1, first - (begin - 1) * size, size)
    if begin < end:
        yield (begin, *(0 for _ in shape[1:])), (end - begin, *shape[1:])
    yield from _in_row(shape, end, 0, last - end * size)


def _in_row(shape: Sequence[int], row: int, first: int, last: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in rectangles(shape[1:], first, last):
        yield (row, *offsets), (1, *sizes)


def placed_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and sharding."""
    return one.shape == other.shape and getattr(one, "bounds", None) == getattr(other, "bounds", None)
