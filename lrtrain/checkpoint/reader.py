"""Reading checkpoints of torch.distributed.checkpoint without running what they say.

Torch unpickles a checkpoint's metadata, and every value that is no tensor, with all that pickle may do: call anything.
Here the metadata may name its own classes alone, and there are no values but tensors.
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
    """Raises UnpicklingError for whatever does not belong into the metadata of a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name == "PosixPath":  # of pathlib, whose modules differ between versions of Python
            return PosixPath
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint")


class TensorReader(FileSystemReader):
    """Reads a checkpoint from files; raises UnpicklingError where its metadata names something else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        """Read once: with thousands of shards it takes seconds, too long to do so for each tensor."""
        with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
            metadata = MetadataUnpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors; raises UnpicklingError for anything else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is not a tensor")
