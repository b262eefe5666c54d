"""A model whose construction is recorded rather than carried out, and replayed one tensor at a time.

transformers initializes a tensor in several places: its module's constructor, `_init_weights` of that module, and those
of its parents (GPT-2 draws `c_proj` again in the block that holds it). Here all of them run once on tensors
without memory, and each operation is recorded. Replaying the operations that a tensor depends on gives its exact value,
with only this tensor and its inputs in memory.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

META = torch.device("meta")

OVERWRITES = {"normal_", "uniform_", "zero_", "fill_", "copy_", "random_", "bernoulli_"}
"""Operations that overwrite their first argument completely."""


@dataclass(frozen=True)
class Operation:
    """A recorded operation that created or changed storages."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Tensor]
    reads: set[int]
    """Storages whose earlier contents it depends on."""
    overwrites: bool
    """Whether it overwrites the storages that it changes completely."""


class _SaidToBeOnCPU(TorchFunctionMode):
    """No code sees that a tensor is on meta: torch's `orthogonal_` would do nothing, and what is made of data for its
    device would lose them."""

    ANSWERS: Mapping[Any, Any] = {
        Tensor.is_meta.__get__: False,  # pyright: ignore[reportAttributeAccessIssue]
        Tensor.device.__get__: torch.device("cpu"),  # pyright: ignore[reportAttributeAccessIssue]
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.ANSWERS[func] if func in self.ANSWERS else func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """While active, creates every new tensor on meta and records the operations on such tensors.

    Tensors created from data (`torch.tensor`, `from_numpy`) stay real.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.writers: defaultdict[int, list[int]] = defaultdict(list)
        self.disguise = _SaidToBeOnCPU()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors(args, kwargs)
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        if not (any(t.is_meta for t in tensors) or (takes_device and not tensors)):
            return func(*args, **kwargs)
        if takes_device:
            kwargs = kwargs | {"device": META}
        if not any(isinstance(r.type, torch._C.TensorType | torch._C.ListType) for r in func._schema.returns):
            return func(*tree_map_only(Tensor, self.value, args), **kwargs)  # a number that depends on values
        found = func(*tree_map_only(Tensor, _on_meta, args), **tree_map_only(Tensor, _on_meta, kwargs))
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith(("empty", "new_empty")):  # memory without contents
            self._note(func, args, kwargs, found, _changed(func, args, kwargs), name in OVERWRITES)
        return found

    def __enter__(self) -> "Recording":
        self._truncated = nn.init._no_grad_trunc_normal_
        nn.init._no_grad_trunc_normal_ = self._truncated_normal
        self.disguise.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        nn.init._no_grad_trunc_normal_ = self._truncated
        super().__exit__(*error)
        self.disguise.__exit__(*error)

    def _truncated_normal(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Recorded as one operation, because torch's implementation depends on values (it redraws outliers)."""
        self._note(self._truncated, (tensor, *args), kwargs, tensor, [tensor], True)
        return tensor

    def _note(
        self, func: Callable[..., Any], args: Any, kwargs: Any, found: Any, changed: list[Tensor], anew: bool
    ) -> None:
        before = {_storage(t) for t in _tensors(args, kwargs)}
        results = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        kept = {_storage(t) for t in changed}
        written = ({_storage(t) for t in results} - before) | kept
        if not written:
            return  # a view
        overwrites = anew and all(t.numel() * t.element_size() == _bytes(t) for t in changed)
        for key in written:
            self.writers[key].append(len(self.operations))
        reads = before - kept if overwrites else before
        args, kwargs, results = tree_map_only(Tensor, Tensor.detach, (args, kwargs, results))  # shapes may change
        self.operations.append(Operation(func, args, kwargs, results, reads, overwrites))

    def value(self, tensor: Tensor) -> Tensor:
        """The value of a recorded tensor, on the CPU, with random numbers from torch's global generator.

        Raises:
            ValueError: if nothing was ever written to it, or to a part of it, or to what it is computed from.
        """
        if not tensor.is_meta:
            return tensor
        needed: set[int] = set()
        self._collect(_storage(tensor), len(self.operations), needed)
        memory: dict[int, torch.UntypedStorage] = {}
        for i in sorted(needed):
            _replay(self.operations[i], memory)
        found = _real(tensor, memory)
        if found.numel() and (not needed or (found.is_floating_point() and found.isnan().any())):
            raise ValueError("its memory is allocated and never written")
        return found

    def _collect(self, key: int, before: int, needed: set[int]) -> None:
        """Add the indices of operations before `before` that the contents of a storage depend on."""
        writers = self.writers[key]
        for i in reversed(writers[: bisect_left(writers, before)]):
            if i not in needed:
                needed.add(i)
                for read in self.operations[i].reads - {key}:
                    self._collect(read, i, needed)
            if self.operations[i].overwrites:
                return


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a model by name, under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _replay(operation: Operation, memory: dict[int, torch.UntypedStorage]) -> None:
    def real(tensor: Tensor) -> Tensor:
        return _real(tensor, memory)

    kwargs = {key: torch.device("cpu") if value is META else value for key, value in operation.kwargs.items()}
    args, kwargs = tree_map_only(Tensor, real, operation.args), tree_map_only(Tensor, real, kwargs)
    found = [t for t in tree_leaves(operation.function(*args, **kwargs)) if isinstance(t, Tensor)]
    for recorded, result in zip(operation.results, found, strict=True):
        if _storage(recorded) not in memory:
            _real(recorded, memory).copy_(result)


def _real(tensor: Tensor, memory: dict[int, torch.UntypedStorage]) -> Tensor:
    """The real tensor for one on meta: the same view of allocated memory."""
    if not tensor.is_meta:
        return tensor
    key = _storage(tensor)
    if key not in memory:
        bytes_of_nan = torch.full((_bytes(tensor),), 255, dtype=torch.uint8, device="cpu")
        memory[key] = bytes_of_nan.untyped_storage()
    view = (tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device="cpu").set_(memory[key], *view)  # pyright: ignore


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]


def _on_meta(tensor: Tensor) -> Tensor:
    return tensor.to(META)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
