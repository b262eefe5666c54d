"""Counts what a step does: kernels, memory, syncs, copies and collectives."""

import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Raised by fake tensors when their values are asked for.
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode  # no public name, though documented
from torch.utils._pytree import tree_leaves

import lrtrain
from lrtrain.config.schema import GPUConfig
from lrtrain.planning.live_bytes import LiveBytes
from lrtrain.simulation.hardware import NARROW, kernel_seconds, wire_seconds
from lrtrain.simulation.operators import bytes_moved, flops_of, launches, size

PACKAGE = str(Path(lrtrain.__file__).parent)
OWN = str(Path(__file__).parent)

VALUE = 2
"""What every number read from a tensor is: a finite loss, norm and step; a true truth value."""
CHECKED = frozenset("aten::_linalg_eigh aten::_linalg_svd aten::linalg_lstsq aten::linalg_eig".split())
"""Factorizations after which torch reads on the CPU whether they converged."""
SIZED_BY_VALUES = frozenset("aten::nonzero aten::masked_select aten::_unique2 aten::unique_dim".split())
RECEIVED = {"all_reduce": 2.0, "allreduce": 2.0}
"""By a process in a ring collective ÷ bytes of the whole tensor · (n − 1)/n; others: 1."""


@dataclass
class Work:
    """Work of one kind."""

    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def add(self, count: int, flops: float, moved: float, seconds: float) -> None:
        self.count += count
        self.flops += flops
        self.bytes += moved
        self.seconds += seconds


@dataclass
class Counts:
    """What a step has done so far; phases are those of `LiveBytes`."""

    work: defaultdict[tuple[str, str], Work] = field(default_factory=lambda: defaultdict(Work))
    """By (phase, kind): matmul, attention, other."""
    collectives: defaultdict[tuple[str, str, str], Work] = field(default_factory=lambda: defaultdict(Work))
    """By (phase, device, name); bytes that this process receives."""
    syncs: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """By (phase, line of lrtrain, operator)."""
    copies: defaultdict[tuple[str, str, str], Work] = field(default_factory=lambda: defaultdict(Work))
    """By (phase, line of lrtrain, direction)."""
    seconds: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    """Of kernels, by (phase, operator)."""
    mixed: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Operators on tensors of several devices, by (line of lrtrain, operator): an error on a GPU."""


class Watch(TorchDispatchMode):
    """Counts every operator; a dispatch mode to enter within FakeTensorMode."""

    def __init__(self, gpu: GPUConfig, memory: LiveBytes):
        super().__init__()
        self.gpu = gpu
        self.memory = memory
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (Tensor, torch.nn.Parameter, FakeTensor) for kind in types):
            return NotImplemented  # a DTensor: its parts are counted when it calls their operators
        kwargs = kwargs or {}
        name = func._schema.name
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in given if self._is_here(t)]
        if name.startswith("c10d::"):
            self._collective(name, args, given)
        if here and name in (*CHECKED, *SIZED_BY_VALUES):
            self.sync(name)
        if name == "aten::_local_scalar_dense":
            return self._number(func, args)
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self.memory.see(tensor)
        if not name.startswith(("c10d::", "prim::", "profiler::")):
            self._kernel(func, args, kwargs, out, here, [t for t in made if self._is_here(t)])
            self._between_devices(name, kwargs, given, made)
        return out

    def sync(self, what: str) -> None:
        """Count that the CPU waits for the GPU."""
        self.counts.syncs[self.memory.phase, line_of_lrtrain(), what.removeprefix("aten::")] += 1

    def _is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.memory.device.type

    def _number(self, func: Any, args: Any) -> Any:
        """A number read from a tensor."""
        if self._is_here(args[0]):
            self.sync("item")
        try:
            return func(*args)
        except DataDependentOutputException:
            kind = args[0].dtype
            return bool(VALUE) if kind == torch.bool else float(VALUE) if kind.is_floating_point else VALUE

    def _kernel(self, func: Any, args: Any, kwargs: Any, out: Any, here: list[Tensor], made: list[Tensor]) -> None:
        if not (count := launches(func, here or made)):
            return
        flops, attention = flops_of(func, args, kwargs, out)
        moved = bytes_moved(func, args, here, made)
        dtypes = [t.dtype for t in (*here, *made) if t.is_floating_point()]
        dtype = next((d for d in dtypes if d in NARROW), torch.float32)
        seconds = max(kernel_seconds(self.gpu, flops, moved, dtype), count * self.gpu.kernel)
        kind = "attention" if attention else "matmul" if flops else "other"
        self.counts.work[self.memory.phase, kind].add(count, flops, moved, seconds)
        self.counts.seconds[self.memory.phase, func._schema.name.removeprefix("aten::")] += seconds

    def _between_devices(self, name: str, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Count a copy between CPU and GPU; it is also a sync unless it is non_blocking."""
        whole = [t for t in (*given, *made) if t.ndim or name in ("aten::_to_copy", "aten::copy_")]
        devices = [t.device.type for t in whole if t.device.type != "meta"]
        if len({*devices}) < 2:
            return
        if name not in ("aten::_to_copy", "aten::copy_"):
            self.counts.mixed[line_of_lrtrain(), name] += 1
            return
        source, target = (given[1], given[0]) if name == "aten::copy_" else (given[0], made[0])
        direction = "GPU → CPU" if self._is_here(source) else "CPU → GPU"
        self.counts.copies[self.memory.phase, line_of_lrtrain(), direction].add(1, 0, size(target), 0)
        if not kwargs.get("non_blocking"):
            self.sync(f"copy {direction}")

    def _collective(self, name: str, args: Any, given: list[Tensor]) -> None:
        group = next((ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and is_group(a)), None)
        if group is None or not given:
            return
        members = dist.get_process_group_ranks(group)
        label = name.removeprefix("c10d::").strip("_")
        factor = next((f for part, f in RECEIVED.items() if part in label), 1.0)
        received = factor * max(map(size, given)) * (len(members) - 1) / len(members)
        device = "GPU" if any(map(self._is_here, given)) else "CPU"
        seconds = wire_seconds(self.gpu, received, members)
        self.counts.collectives[self.memory.phase, device, label].add(1, 0, received, seconds)


def is_group(found: torch.ScriptObject) -> bool:
    """Whether a scripted object is a process group."""
    return "ProcessGroup" in str(found._type())  # pyright: ignore[reportAttributeAccessIssue]


def line_of_lrtrain() -> str:
    """The innermost line of lrtrain, outside the simulation, that is being executed: `engine/base.py:170 _step`."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE) and not file.startswith(OWN):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"
