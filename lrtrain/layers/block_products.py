"""Products with a matrix S of b×b blocks, as operators that torch.compile, fake tensors and FLOP counters know.

On CUDA they are Triton kernels (`block_kernels`), elsewhere batched products (`sparse_support`). S is given by its
values (nnz,) and the block columns `col` (out/b, k) of each block row. Each operator computes in one pass over its
inputs: no gathered copy of x is ever stored.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from lrtrain.errors import ConfigError
from lrtrain.layers import sparse_support as batched

BLOCKS = (16, 32, 64, 128)
"""The sides of blocks that the kernels know: tensor cores multiply at least 16×16."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def missing(block: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there are no Triton kernels for these blocks; None if there are."""
    if device.type != "cuda":
        return f"its kernels run on cuda, not on {device.type}"
    if block not in BLOCKS:
        return f"its kernels know blocks of {', '.join(map(str, BLOCKS))}, not of {block}"
    if dtype not in DTYPES:
        return f"its kernels know bfloat16, float16 and float32, not {dtype}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def transposed_lists(col: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The blocks of S by block columns: `starts` (columns + 1,) and `entries` (blocks,), int32. Entry i·k + j is the
    j-th block of block row i; those of block column c are entries[starts[c]:starts[c + 1]], by ascending row.

    Args:
        col: (out/b, k).
        columns: number of block columns, in/b.
    """
    ordered, entries = col.flatten().int().sort(stable=True)
    bounds = torch.arange(columns + 1, dtype=torch.int32, device=col.device)
    return torch.searchsorted(ordered, bounds, out_int32=True), entries.int()


_LISTS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The `transposed_lists` of each `col`, with the version of `col` that they are of."""


def lists_of(col: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """`transposed_lists`, made once for each support."""
    known = _LISTS.get(col)
    if known is None or known[0] != col._version:
        known = _LISTS[col] = (col._version, transposed_lists(col, columns))
    return known[1]


def _kernels() -> ModuleType:
    try:
        from lrtrain.layers import block_kernels
    except ImportError as error:  # on another machine than the one that chose it
        raise ConfigError(f"param.execution=triton needs Triton: {error}; install it, or use factored") from error
    return block_kernels


# --- y += x Sᵀ ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("lrtrain::block_add_", mutates_args=("y",), device_types="cpu")
def block_add_(y: Tensor, values: Tensor, col: Tensor, block: int, x: Tensor) -> None:
    """y (tokens, out) += x Sᵀ, x (tokens, in)."""
    batched.block_add_(y, values, col, block, x)


@block_add_.register_kernel("cuda")
def _(y: Tensor, values: Tensor, col: Tensor, block: int, x: Tensor) -> None:
    _kernels().add(y, values, col, block, x)


@block_add_.register_fake
def _(y: Tensor, values: Tensor, col: Tensor, block: int, x: Tensor) -> None:
    return None


# --- y += g S ----------------------------------------------------------------------------------------------------


@torch.library.custom_op("lrtrain::block_add_transposed_", mutates_args=("y",), device_types="cpu")
def block_add_transposed_(y: Tensor, values: Tensor, col: Tensor, block: int, g: Tensor) -> None:
    """y (tokens, in) += g S, g (tokens, out)."""
    batched.block_add_transposed_(y, values, col, block, g)


@block_add_transposed_.register_kernel("cuda")
def _(y: Tensor, values: Tensor, col: Tensor, block: int, g: Tensor) -> None:
    _kernels().add_transposed(y, values, col, block, lists_of(col, y.shape[1] // block), g)


@block_add_transposed_.register_fake
def _(y: Tensor, values: Tensor, col: Tensor, block: int, g: Tensor) -> None:
    return None


# --- gᵀ x on the support -----------------------------------------------------------------------------------------


@torch.library.custom_op("lrtrain::block_sampled", mutates_args=(), device_types="cpu")
def block_sampled(g: Tensor, x: Tensor, col: Tensor, block: int) -> Tensor:
    """gᵀ x on the support (nnz,), g (tokens, out), x (tokens, in)."""
    return batched.block_sampled(g, x, col, block)


@block_sampled.register_kernel("cuda")
def _(g: Tensor, x: Tensor, col: Tensor, block: int) -> Tensor:
    return _kernels().sampled(g, x, col, block)


@block_sampled.register_fake
def _(g: Tensor, x: Tensor, col: Tensor, block: int) -> Tensor:
    return x.new_empty(col.numel() * block**2)


# --- FLOPs -------------------------------------------------------------------------------------------------------


@register_flop_formula([torch.ops.lrtrain.block_add_, torch.ops.lrtrain.block_add_transposed_])
def _(y: Any, values: Any, col: Any, block: int, other: Any, *_, **__) -> int:
    return 2 * y[0] * values[0]


@register_flop_formula(torch.ops.lrtrain.block_sampled)
def _(g: Any, x: Any, col: Any, block: int, *_, **__) -> int:
    return 2 * g[0] * col[0] * col[1] * block**2
