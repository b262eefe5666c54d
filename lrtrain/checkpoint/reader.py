"""Reading checkpoints of torch.distributed.checkpoint without executing code from them.

Torch unpickles a checkpoint's metadata, and all values that are not tensors; pickle can call any function.
Here the metadata may only name metadata classes, and values must be tensors.
"""

import io
import pickle
from functools import cached_property
from pathlib import PosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}  # fmt: skip


class MetadataUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for classes that do not belong to the metadata of a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name == "PosixPath":  # pathlib's module path differs between versions of Python
            return PosixPath
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")


class TensorReader(FileSystemReader):
    """Reads a checkpoint from files; raises UnpicklingError if its metadata names other classes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        """The metadata, read once: with thousands of shards reading takes seconds, too long for each tensor."""
        with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
            metadata = MetadataUnpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors; raises UnpicklingError for anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")
