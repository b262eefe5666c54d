"""The bytes that live on a device without memory, by storage."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BLOCK = 512
"""The CUDA caching allocator gives out multiples of so many bytes."""


class LiveBytes:
    """Counts storages of a device from their first use to their end."""

    def __init__(self, device: torch.device):
        self.device = device
        self.phase = "start"
        self.now = 0
        self.peak: defaultdict[str, int] = defaultdict(int)
        """Most bytes at a time, by phase."""
        self._sizes: dict[int, int] = {}
        self._left_out: list[Tensor] = []

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new and on the device."""
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
            self._resize(key, storage.nbytes())

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor's storage, however often it is seen."""
        key = tensor.untyped_storage()._cdata
        self._sizes[key] = 0
        self._left_out.append(tensor)  # so that no other storage gets its address

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.phase = phase
        self.peak[phase] = max(self.peak[phase], self.now)

    def _resize(self, key: int, size: int) -> None:
        size = -(-size // BLOCK) * BLOCK
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak[self.phase] = max(self.peak[self.phase], self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """Within it storages that are resized in place are followed: FSDP2 frees and allocates so, which no operator
        shows."""
        real: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            found = real(storage, size)
            if storage._cdata in self._sizes:
                self._resize(storage._cdata, size)
            return found

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = real  # pyright: ignore[reportAttributeAccessIssue]
