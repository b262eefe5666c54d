"""Sparse supports: where the nonzeros of an (out, in) matrix sit, kept as compressed rows.

`crow` (out + 1,) and `col` (nnz,) are int32: four bytes per nonzero, and the form that the CPU's sparse kernels
read. The same arrays read as compressed columns are the transposed matrix, so nothing is stored twice.
"""

import warnings

import torch
from torch import Tensor

warnings.filterwarnings("ignore", message="Sparse C[SR][RC] tensor support is in beta state")


def draw_uniform(total: int, count: int, generator: torch.Generator) -> Tensor:
    """A uniformly random subset of `count` of the numbers 0..total-1, ascending, without a permutation of all."""
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


def compress_rows(flat: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Ascending row-major positions (nnz,) → crow (rows + 1,) and col (nnz,), both int32."""
    starts = torch.arange(rows + 1) * cols
    return torch.searchsorted(flat, starts).int(), (flat % cols).int()


def flat_positions(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """The row-major positions (nnz,) int64 back from compressed rows; transient, for gather and scatter."""
    rows = torch.arange(len(crow) - 1, device=col.device)
    return torch.repeat_interleave(rows * cols, crow.diff(), output_size=len(col)) + col


# The three products with S (out, in) given as (values, crow, col). Custom operators, so that torch.compile keeps the
# sparse tensors out of its graphs.


def _rows(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False)


@torch.library.custom_op("lrtrain::sparse_apply", mutates_args=())
def sparse_apply(values: Tensor, crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    """x Sᵀ: (tokens, in) → (tokens, out)."""
    s = _rows(values, crow, col, (len(crow) - 1, x.shape[1]))
    return (s @ x.T.contiguous()).T.contiguous()  # the kernel is twice as fast on a row-major right-hand side


@sparse_apply.register_fake
def _(values: Tensor, crow: Tensor, col: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], len(crow) - 1)


@torch.library.custom_op("lrtrain::sparse_apply_transposed", mutates_args=())
def sparse_apply_transposed(values: Tensor, crow: Tensor, col: Tensor, g: Tensor, in_features: int) -> Tensor:
    """g S: (tokens, out) → (tokens, in)."""
    shape = (in_features, len(crow) - 1)
    s_t = torch.sparse_csc_tensor(crow, col, values, shape, check_invariants=False)
    return (s_t @ g.T.contiguous()).T.contiguous()


@sparse_apply_transposed.register_fake
def _(values: Tensor, crow: Tensor, col: Tensor, g: Tensor, in_features: int) -> Tensor:
    return g.new_empty(g.shape[0], in_features)


@torch.library.custom_op("lrtrain::sampled_product", mutates_args=())
def sampled_product(crow: Tensor, col: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """(gᵀ x) on the support only: (tokens, out), (tokens, in) → (nnz,). No (out, in) matrix is formed."""
    zeros = _rows(x.new_zeros(len(col)), crow, col, (g.shape[1], x.shape[1]))
    return torch.sparse.sampled_addmm(zeros, g.T.contiguous(), x, beta=0.0).values()


@sampled_product.register_fake
def _(crow: Tensor, col: Tensor, g: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(len(col))
