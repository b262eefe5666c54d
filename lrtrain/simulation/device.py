"""A GPU without memory and without kernels.

On a build of torch without CUDA, autograd aborts the process for fake tensors on `cuda`. So the simulated GPU is of
torch's device type for third-party backends (PrivateUse1), with Python objects for CUDA's streams and events.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

# No public function makes such a backend in Python.
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "simulated"

waits: list[Callable[[], None]] = []
"""Called when the CPU waits for a stream, an event or the device."""


def _wait() -> None:
    for call in waits:
        call()


class Event:
    """An event that has always happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        _wait()


class Stream:
    """A stream in which everything has happened."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.device = torch.device(NAME, 0)

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None:
        _wait()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class _Backend(_DummyBackendModule):
    """`torch.simulated`, as `torch.cuda`."""

    Stream, Event = Stream, Event

    def current_stream(self, device: Any = None) -> Any:
        return Stream()

    def stream(self, stream: Any) -> nullcontext[None]:
        return nullcontext()

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        _wait()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.empty(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def device(self, device: Any) -> nullcontext[None]:
        return nullcontext()


FUSED = ("silu_backward", "mish_backward")
"""Operators that have one kernel on CUDA, and are composed of others on a device that has none for them."""

_kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("fake tensors have no values to compute with")


@functools.cache
def simulated_gpu() -> torch.device:
    """The simulated GPU. This process has it until it ends."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    for operator in FUSED:
        _kernels.impl(operator, _never_called)
    return torch.device(NAME, 0)


@contextmanager
def passed_off_as_cuda() -> Iterator[None]:
    """Within it `is_cuda` of the simulated GPU's tensors is true, so that code takes its path for CUDA."""
    real = torch.Tensor.is_cuda
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type in ("cuda", NAME))  # pyright: ignore
    try:
        yield
    finally:
        torch.Tensor.is_cuda = real
