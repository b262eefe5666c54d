"""The bytes that a forward pass keeps."""

from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages created by `forward` that live as long as its result: saved for the backward pass by
    autograd or checkpointing."""
    with _Storages() as storages:
        result = forward()
    own = result.untyped_storage().nbytes()
    return sum(size for storage, size in storages.made.values() if not storage.expired()) - own


class _Storages(TorchDispatchMode):
    """Records the storages that operators create, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out
