"""What one operator of torch costs: kernels, floating-point operations and bytes."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# The formulas behind FlopCounterMode; the mode itself only counts whole passes.
from torch.utils.flop_counter import flop_registry

NO_KERNEL = frozenset(
    """
    aten::empty aten::empty_like aten::new_empty aten::empty_strided aten::new_empty_strided aten::detach aten::alias
    aten::_unsafe_view aten::view aten::_reshape_alias aten::lift_fresh aten::set_ aten::resize_ aten::is_pinned
    aten::record_stream aten::_local_scalar_dense
    """.split()
)
GATHERS = frozenset("aten::index_select aten::index aten::gather aten::embedding aten::take".split())
SCATTERS = frozenset("aten::index_add_ aten::index_add aten::scatter_add_ aten::scatter_add aten::index_put_".split())
HALVED = "attention"
"""In the names of operators whose causal kernel does half of the operations that torch counts."""

SECTOR = 32
"""Bytes that a GPU reads or writes at a time, however few of them are asked for."""
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""By the number of lists that a kernel for lists of tensors works on (torch's MultiTensorApply.cuh)."""
CHUNK, CHUNKS_PER_LAUNCH = 2**16, 320
"""Entries per chunk and chunks per launch of such a kernel (from the same file)."""


def launches(func: Any, tensors: Sequence[Tensor]) -> int:
    """The number of kernels of an operator: 1, or more for lists of tensors; 0 for views and allocations.

    Operators that torch composes of several kernels (sorts, QR) count as one.
    """
    name = func._schema.name
    returned = [value.alias_info for value in func._schema.returns]
    view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    if view or name in NO_KERNEL or not tensors:
        return 0
    if not name.startswith(("aten::_foreach", "aten::_fused")):
        return 1
    lists = sum("[]" in str(argument.type) or "List" in str(argument.type) for argument in func._schema.arguments)
    lists = min(5, max(1, lists))
    each = len(tensors) / lists
    chunks = sum(-(-t.numel() // CHUNK) for t in tensors) / lists
    return max(1, math.ceil(each / TENSORS_PER_LAUNCH[lists]), math.ceil(chunks / CHUNKS_PER_LAUNCH))


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, bool]:
    """Floating-point operations of the matrix products that an operator carries out, and whether it is attention."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0.0, False
    attention = HALVED in func._schema.name
    return float(formula(*args, **kwargs, out_val=out)) * (0.5 if attention else 1.0), attention


def bytes_moved(func: Any, args: Sequence[Any], given: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Bytes that an operator reads and writes: its tensors, each once; of what is gathered from or scattered to a
    tensor only the entries touched.

    Args:
        given: its tensors.
        made: its results.
    """
    name = func._schema.name
    if name in GATHERS:
        return 2 * sum(map(size, made)) + _sectors(made[0], args[0]) + sum(size(t) for t in given if t is not args[0])
    if name in SCATTERS:
        source = max((t for t in given if t is not args[0] and t.is_floating_point()), key=size, default=given[-1])
        return size(source) + 2 * _sectors(source, args[0]) + sum(size(t) for t in given if not t.is_floating_point())
    return sum(size(t) for t in {id(t): t for t in (*given, *made)}.values())


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's entries; of one that repeats entries (stride 0), of those that exist."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _sectors(entries: Tensor, table: Tensor) -> int:
    """Bytes that the GPU touches for entries that lie anywhere in a table, of whole rows if it has several
    dimensions."""
    run = entries.element_size() * (table.shape[-1] if table.ndim > 1 else 1)
    return entries.numel() * entries.element_size() * max(1, SECTOR // max(1, run))
