"""Sparse supports: the positions of the nonzeros of an (out, in) matrix S, and products with S.

A support is stored by rows, and its values in the same row-major order. Two forms:

* uniform: `crow` (out + 1,) are row pointers and `col` (nnz,) the columns of each row, ascending;
* balanced: `crow` is None, and `col` (out/b, k) are the k nonzero blocks, of b columns each, in each block row of b
  rows; b = 1 means k single columns per row. Each row has k·b values, so no pointers are needed.

Column indices take two bytes up to 65,536 columns (or blocks), else four; they are converted to int32 or int64 only
for a kernel.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse C[SR][RC] tensor support is in beta state")

TILE = 512
"""Tokens per pass of the CPU's kernels: a tile of x, transposed, stays in the cache while its rows are gathered."""


# --- drawing -----------------------------------------------------------------------------------------------------


def column_dtype(columns: int) -> torch.dtype:
    """The smallest dtype for the indices of this many columns."""
    return torch.uint16 if columns <= 2**16 else torch.int32


def draw_uniform(total: int, count: int, generator: torch.Generator) -> Tensor:
    """A uniformly random subset of `count` of the numbers 0..total-1, ascending, without permuting all of them."""
    if 2 * count > total:  # draw the smaller of the subset and its complement
        keep = torch.ones(total, dtype=torch.bool)
        keep[draw_uniform(total, total - count, generator)] = False
        return keep.nonzero().flatten()
    picked = torch.empty(0, dtype=torch.int64)
    while len(picked) < count:
        missing = count - len(picked)
        draw = torch.randint(total, (missing + missing // 16 + 16,), generator=generator)
        picked = torch.cat([picked, draw]).unique()
    keep = torch.ones(len(picked), dtype=torch.bool)
    keep[torch.randperm(len(picked), generator=generator)[: len(picked) - count]] = False
    return picked[keep]


def draw_rows(rows: int, total: int, count: int, generator: torch.Generator) -> Tensor:
    """For each row an independent uniformly random subset of `count` of 0..total-1, ascending: (rows, count)."""
    if 2 * count > total:
        keep = torch.ones(rows, total, dtype=torch.bool)
        keep.scatter_(1, draw_rows(rows, total, total - count, generator), False)
        return keep.nonzero()[:, 1].view(rows, count)
    picked = torch.randint(total, (rows, count), generator=generator)
    while True:  # duplicates in a row are drawn again, which keeps all subsets equally likely
        picked = picked.sort(dim=1).values
        again = torch.zeros_like(picked, dtype=torch.bool)
        again[:, 1:] = picked[:, 1:] == picked[:, :-1]
        missing = int(again.sum())
        if not missing:
            return picked
        picked[again] = torch.randint(total, (missing,), generator=generator)


def compress_rows(flat: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Ascending row-major positions (nnz,) → crow (rows + 1,) int32 and col (nnz,)."""
    starts = torch.arange(rows + 1, device=flat.device) * cols
    return torch.searchsorted(flat, starts).int(), (flat % cols).to(column_dtype(cols))


def flat_positions(crow: Tensor | None, col: Tensor, block: int, cols: int) -> Tensor:
    """The row-major positions (nnz,) int64 of a support in an (out, cols) matrix; transient, for gather and scatter."""
    if crow is not None:
        rows = torch.arange(len(crow) - 1, device=col.device)
        return torch.repeat_interleave(rows * cols, crow.diff(), output_size=len(col)) + col.long()
    inside = torch.arange(block, device=col.device)
    columns = (col.long()[:, :, None] * block + inside).flatten(1)  # (out/b, k·b)
    rows = torch.arange(len(col) * block, device=col.device).view(-1, block, 1)
    return (rows * cols + columns[:, None, :]).flatten()  # (out/b, b, k·b) → (nnz,)


# --- products with single entries --------------------------------------------------------------------------------
# For S (out, in) as (values, crow, col), on the CPU. Custom operators, which torch.compile does not trace into.


def _as_bags(crow: Tensor | None, col: Tensor) -> tuple[Tensor, Tensor]:
    """Row pointers (out + 1,) and columns (nnz,), both int32."""
    if crow is None:
        crow = torch.arange(len(col) + 1, dtype=torch.int32) * col.shape[1]
    return crow, col.flatten().int()


def _transposed(values: Tensor, crow: Tensor, col: Tensor, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """The values, row pointers and columns of Sᵀ (cols, out), by a stable radix sort."""
    ordered, order = col.sort(stable=True)
    rows = torch.arange(len(crow) - 1, dtype=torch.int32).repeat_interleave(crow.diff(), output_size=len(col))
    pointers = torch.searchsorted(ordered, torch.arange(cols + 1, dtype=torch.int32), out_int32=True)
    return values[order], pointers, rows[order]


def _times(values: Tensor, crow: Tensor, col: Tensor, x_t: Tensor) -> Tensor:
    """S x_t: (in, tile) → (out, tile), by embedding_bag, torch's fastest sparse product on a CPU."""
    return embedding_bag(col, x_t, crow, mode="sum", per_sample_weights=values, include_last_offset=True)


@torch.library.custom_op("lrtrain::sparse_apply", mutates_args=())
def sparse_apply(values: Tensor, crow: Tensor | None, col: Tensor, x: Tensor) -> Tensor:
    """x Sᵀ: (tokens, in) → (tokens, out)."""
    pointers, columns = _as_bags(crow, col)
    y = x.new_empty(len(x), len(pointers) - 1)
    for x_tile, y_tile in zip(x.split(TILE), y.split(TILE), strict=True):
        y_tile.copy_(_times(values, pointers, columns, x_tile.T.contiguous()).T)
    return y


@sparse_apply.register_fake
def _(values: Tensor, crow: Tensor | None, col: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], len(col) if crow is None else len(crow) - 1)


@torch.library.custom_op("lrtrain::sparse_gradients", mutates_args=())
def sparse_gradients(values: Tensor, crow: Tensor | None, col: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """g (tokens, out), x (tokens, in) → g S (tokens, in), and gᵀ x on the support only (nnz,), without an (out, in)
    matrix."""
    pointers, columns = _as_bags(crow, col)
    transposed = _transposed(values, pointers, columns, x.shape[1])
    shape = (g.shape[1], x.shape[1])
    total = torch.sparse_csr_tensor(pointers, columns, torch.zeros_like(values), shape, check_invariants=False)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    for g_tile, x_tile, dx_tile in zip(g.split(TILE), x.split(TILE), dx.split(TILE), strict=True):
        g_t, x_t = g_tile.T.contiguous(), x_tile.T.contiguous()
        dx_tile.copy_(_times(*transposed, g_t).T)
        torch.sparse.sampled_addmm(total, g_t, x_t.T, out=total)
    return dx, total.values()


@sparse_gradients.register_fake
def _(values: Tensor, crow: Tensor | None, col: Tensor, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


# --- products with blocks ----------------------------------------------------------------------------------------
# For S of b×b blocks: batched matrix products over gathered blocks of x. Plain torch: any device and dtype.


def _gathered(x: Tensor, col: Tensor, block: int) -> Tensor:
    """The columns of x (tokens, in) that each block row of S multiplies: a view (out/b, tokens, k·b) of a copy."""
    blocks = x.unflatten(1, (-1, block)).index_select(1, col.flatten().int())  # (tokens, out/b · k, b)
    return blocks.view(len(x), len(col), -1).transpose(0, 1)


def _by_block_rows(y: Tensor, block: int) -> Tensor:
    """(tokens, out) → a view (out/b, tokens, b)."""
    return y.unflatten(1, (-1, block)).transpose(0, 1)


def block_add_(y: Tensor, values: Tensor, col: Tensor, block: int, x: Tensor) -> Tensor:
    """y (tokens, out) += x Sᵀ, x (tokens, in)."""
    weights = values.view(len(col), block, -1)  # (out/b, b, k·b)
    _by_block_rows(y, block).add_(torch.bmm(_gathered(x, col, block), weights.mT))
    return y


def block_add_transposed_(y: Tensor, values: Tensor, col: Tensor, block: int, g: Tensor) -> Tensor:
    """y (tokens, in) += g S, g (tokens, out)."""
    weights = values.view(len(col), block, -1)
    parts = torch.bmm(weights.mT, _by_block_rows(g, block).mT)  # (out/b, k·b, tokens)
    sums = y.new_zeros(y.shape[1] // block, block, len(y))
    sums.index_add_(0, col.flatten().int(), parts.view(-1, block, len(y)))
    return y.add_(sums.flatten(0, 1).T)


def block_sampled(g: Tensor, x: Tensor, col: Tensor, block: int) -> Tensor:
    """gᵀ x on the support only (nnz,), g (tokens, out), x (tokens, in)."""
    return torch.bmm(_by_block_rows(g, block).mT, _gathered(x, col, block)).flatten()
