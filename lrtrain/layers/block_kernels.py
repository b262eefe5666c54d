# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
# (Triton need not be installed, and its kernels are launched by an index.)
"""Triton kernels for products with a matrix S of b×b blocks, for CUDA.

S (out, in) is stored as in `lrtrain.layers.sparse_support`: `col` (out/b, k) are the block columns of each block row,
and the values (nnz,) are an array (out/b, b, k·b). All kernels gather blocks of x or g on their own, accumulate in
float32, and add in a fixed order without atomics, so that results are the same bit for bit in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048
"""Fewest tokens over which one program sums a gradient of values."""
MOST_CHUNKS = 8
"""Most partial sums of a gradient of values, which bounds their buffer."""
WIDTH = 128
"""Columns of a block row whose gradients one program computes."""


@triton.jit
def _add(
    y, values, col, x, tokens, outs, ins, count,
    B: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (tokens, out) += x Sᵀ: one program per block row and tile of tokens. Programs that run at the same time share a
    tile of x, which stays in the L2 cache."""
    row, tile = tl.program_id(0), tl.program_id(1)
    t = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = tl.arange(0, B)
    sums = tl.zeros((TILE, B), dtype=tl.float32)
    for j in range(count):
        column = tl.load(col + row * count + j).to(tl.int32)
        part = tl.load(x + t[:, None] * ins + (column * B + inside)[None, :], mask=t[:, None] < tokens, other=0.0)
        block = tl.load(values + (row * B + inside)[None, :] * (count * B) + (j * B + inside)[:, None])  # (in, out)
        sums = tl.dot(part, block, sums, input_precision=PRECISION)
    at = y + t[:, None] * outs + (row * B + inside)[None, :]
    before = tl.load(at, mask=t[:, None] < tokens, other=0.0)
    tl.store(at, (before + sums).to(y.dtype.element_ty), mask=t[:, None] < tokens)


@triton.jit
def _add_transposed(
    y, values, starts, entries, g, tokens, outs, ins, count,
    B: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (tokens, in) += g S: one program per block column and tile of tokens."""
    column, tile = tl.program_id(0), tl.program_id(1)
    t = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
    inside = tl.arange(0, B)
    sums = tl.zeros((TILE, B), dtype=tl.float32)
    for e in range(tl.load(starts + column), tl.load(starts + column + 1)):
        entry = tl.load(entries + e)
        row, j = entry // count, entry % count
        part = tl.load(g + t[:, None] * outs + (row * B + inside)[None, :], mask=t[:, None] < tokens, other=0.0)
        block = tl.load(values + (row * B + inside)[:, None] * (count * B) + (j * B + inside)[None, :])  # (out, in)
        sums = tl.dot(part, block, sums, input_precision=PRECISION)
    at = y + t[:, None] * ins + (column * B + inside)[None, :]
    before = tl.load(at, mask=t[:, None] < tokens, other=0.0)
    tl.store(at, (before + sums).to(y.dtype.element_ty), mask=t[:, None] < tokens)


@triton.jit
def _sampled(
    partial_sums, col, g, x, tokens, outs, ins, count, nnz, chunk,
    B: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial_sums (chunks, nnz) = gᵀ x on the support, over one chunk of tokens each: one program per block row,
    `WIDTH` of its columns, and chunk."""
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    inside = tl.arange(0, B)
    across = group * WIDTH + tl.arange(0, WIDTH)
    here = across < count * B
    columns = tl.load(col + row * count + across // B, mask=here, other=0).to(tl.int32) * B + across % B
    columns = tl.max_contiguous(tl.multiple_of(columns, B), B)  # so that blocks of x are read by wide loads
    sums = tl.zeros((B, WIDTH), dtype=tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, tokens), TILE):
        t = (start + tl.arange(0, TILE)).to(tl.int64)
        inner = t[:, None] < tokens
        left = tl.load(g + t[:, None] * outs + (row * B + inside)[None, :], mask=inner, other=0.0)
        right = tl.load(x + t[:, None] * ins + columns[None, :], mask=inner & here[None, :], other=0.0)
        sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION)
    at = part.to(tl.int64) * nnz + (row * B + inside)[:, None] * (count * B) + across[None, :]
    tl.store(partial_sums + at, sums, mask=here[None, :])


# --- launching ---------------------------------------------------------------------------------------------------


def tile_of(dtype: torch.dtype, block: int) -> int:
    """Tokens per program of the sums over blocks; float32 and large blocks take more shared memory per token."""
    return 128 if dtype.itemsize == 2 and block < 128 else 64


def sampled_tile(dtype: torch.dtype) -> int:
    """Tokens per product of the sums over tokens."""
    return 64 if dtype.itemsize == 2 else 32


def stages_of(dtype: torch.dtype, block: int) -> int:
    """Tiles that are loaded ahead: as many as fit into 99 KB of shared memory, which every GPU since Ampere has."""
    return 3 if dtype.itemsize == 2 and block < 128 else 2


def _settings(x: Tensor, block: int) -> dict[str, int | str]:
    exact = torch.get_float32_matmul_precision() == "highest"
    stages = stages_of(x.dtype, block)
    return {"B": block, "PRECISION": "ieee" if exact else "tf32", "num_warps": 4, "num_stages": stages}


def add(y: Tensor, values: Tensor, col: Tensor, block: int, x: Tensor) -> None:
    """y (tokens, out) += x Sᵀ, x (tokens, in)."""
    tile, x = tile_of(x.dtype, block), x.contiguous()
    if col.numel() and len(x):
        grid = (len(col), triton.cdiv(len(x), tile))
        _add[grid](y, values, col, x, *y.shape, x.shape[1], col.shape[1], TILE=tile, **_settings(x, block))


def add_transposed(y: Tensor, values: Tensor, col: Tensor, block: int, lists: tuple[Tensor, Tensor], g: Tensor) -> None:
    """y (tokens, in) += g S, g (tokens, out).

    Args:
        lists: of `transposed_lists`.
    """
    tile, g = tile_of(g.dtype, block), g.contiguous()
    shape = (*g.shape, y.shape[1], col.shape[1])
    if col.numel() and len(g):
        grid = (y.shape[1] // block, triton.cdiv(len(g), tile))
        _add_transposed[grid](y, values, *lists, g, *shape, TILE=tile, **_settings(g, block))


def sampled(g: Tensor, x: Tensor, col: Tensor, block: int) -> Tensor:
    """gᵀ x on the support (nnz,), g (tokens, out), x (tokens, in)."""
    tile, width = sampled_tile(x.dtype), max(WIDTH, block)
    nnz, g, x = col.numel() * block**2, g.contiguous(), x.contiguous()
    chunk = max(CHUNK, tile * triton.cdiv(len(x), tile * MOST_CHUNKS))
    chunks = triton.cdiv(len(x), chunk)
    sums = x.new_empty(chunks, nnz, dtype=torch.float32)
    shape = (*g.shape, x.shape[1], col.shape[1], nnz, chunk)
    if nnz and chunks:
        grid = (len(col), triton.cdiv(col.shape[1] * block, width), chunks)
        _sampled[grid](sums, col, g, x, *shape, WIDTH=width, TILE=tile, **_settings(x, block))
    return sums.sum(0).to(x.dtype)
