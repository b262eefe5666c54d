"""Orthogonalization and spectral norm of matrices whose rows are sharded."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lrtrain.optim.deal import Deal
from lrtrain.optim.rows import Rows

Coefficients = tuple[tuple[float, float, float], ...]
"""(a, b, c) of σ ← aσ + bσ³ + cσ⁵, one triple per iteration."""

Orthogonalization = Literal["polar_express", "quintic"]
ITERATIONS: dict[Orthogonalization, Coefficients] = {
    # Amsel et al., arXiv 2505.16932, with a margin of 2% for rounding. Singular values that are at least .003 of the
    # Frobenius norm end within [.86, 1.14].
    "polar_express": (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ),
    # Jordan's, also used by torch, Trion and Spectron: such singular values end within [.68, 1.14].
    "quintic": ((3.4445, -4.7750, 2.0315),) * 5,
}

Adjustment = Literal["match_rms_adamw", "jordan", "spectral"]
ADJUSTMENTS: dict[Adjustment, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "jordan": lambda m, n: max(1, m / n) ** 0.5,
    "spectral": lambda m, n: (m / n) ** 0.5,
}
"""The factor on an orthogonalized step (m, n).

`match_rms_adamw`: makes the step's root mean square 0.2, about AdamW's, so that AdamW's learning rate and decay carry
over (Liu et al., arXiv 2502.16982). `jordan`: as in Muon's first code. `spectral`: changes outputs equally at any size
(Dion's).
"""


def orthogonalize(x: Tensor, rows: Rows, coefficients: Coefficients) -> Tensor:
    """Approximately UVᵀ of each unsharded matrix USVᵀ (m, n), by Newton–Schulz iteration.

    In float32 it works on Gram matrices only, with one collective: an all-reduce of (n, n) if m ≥ n, else an all-gather
    of the matrix. On CUDA it is the usual iteration in bfloat16, on whole matrices that are dealt out to the processes
    (see `Deal`), with a new Gram matrix in each iteration, because updating the Gram matrix, as in float32, would
    accumulate rounding errors.

    Args:
        x: this process's rows ([matrices,] rows, n), float32; unchanged.
        rows: `Rows` of each parameter; x may have another number of columns.
        coefficients: of the iteration.

    Returns:
        This process's rows, float32.
    """
    if x.is_cuda:
        return _orthogonalize_bfloat16(x, rows, coefficients)
    if rows.shape[0] >= x.shape[-1]:
        return x @ inverse_root(rows.sum(x.mT @ x), coefficients)
    whole = rows.gather(x)
    return rows.cut(inverse_root(whole @ whole.mT, coefficients)) @ whole


def _orthogonalize_bfloat16(x: Tensor, rows: Rows, coefficients: Coefficients) -> Tensor:
    deal = Deal(rows, x)
    return deal.back(newton_schulz(deal.out(x.bfloat16()), coefficients)).float()


def inverse_root(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """The matrix Y (…, k, k) by which Newton–Schulz iteration multiplies X, for `gram` = XᵀX (or XXᵀ, from the left).

    With A₀ = XᵀX / ‖X‖²_F and Pₖ = aI + bAₖ + cAₖ²: Aₖ₊₁ = Aₖ Pₖ², Y = P₁ ⋯ P₅ / ‖X‖_F. All of these commute. Updating
    Aₖ keeps small singular values accurate; recomputing it as Y A₀ Y in each iteration would not.
    """
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1) if gram.ndim > 2 else gram.trace()
    norm_squared = trace.clamp_min(torch.finfo(gram.dtype).tiny)[..., None, None]
    a_k = gram / norm_squared
    y = polynomial = _polynomial(a_k, *coefficients[0])
    for abc in coefficients[1:]:
        a_k = polynomial @ a_k @ polynomial
        polynomial = _polynomial(a_k, *abc)
        y = y @ polynomial
    return y / norm_squared.sqrt()


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + bA + cA²."""
    found = _add_product(gram, gram, gram, beta=b, alpha=c)
    found.diagonal(dim1=-2, dim2=-1).add_(a)
    return found


def _add_product(to: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1) -> Tensor:
    """beta·to + alpha·left @ right for matrices or stacks of them."""
    return (torch.addmm if to.ndim == 2 else torch.baddbmm)(to, left, right, beta=beta, alpha=alpha)


def newton_schulz(x: Tensor, coefficients: Coefficients) -> Tensor:
    """X ← X (aI + bA + cA²) with A = XᵀX, from X / ‖X‖_F, in the dtype of X (matrices, m, n)."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp_min_(torch.finfo(torch.float32).tiny).to(x.dtype)
    wide = x.shape[-2] < x.shape[-1]
    x = x.mT if wide else x
    for a, b, c in coefficients:
        gram = x.mT @ x
        x = _add_product(x, x, _add_product(gram, gram, gram, beta=b, alpha=c), beta=a)
    return x.mT if wide else x


def spectral_norm(x: Tensor, rows: Rows, vector: Tensor, iterations: int) -> Tensor:
    """A lower bound on the largest singular value of each unsharded matrix (m, n), by power iteration on XᵀX.

    One all-reduce of ([matrices,] n) per iteration.

    Args:
        x: this process's rows ([matrices,] rows, n), float32.
        vector: starting vector ([matrices,] n), the same on all processes. It is overwritten by the right singular
            vector of norm one, the starting vector for the next call after a small change of the matrix; a zero matrix
            leaves it as is.

    Returns:
        ([matrices]).
    """
    tiny = torch.finfo(x.dtype).tiny
    vector.div_(_length(vector).clamp_min(tiny))
    before = after = vector[..., None]
    image = norm = x.new_zeros(())
    for _ in range(iterations):
        before = after
        image = rows.sum(x.mT @ (x @ before))
        norm = torch.linalg.vector_norm(image, dim=-2, keepdim=True)
        after = image / norm.clamp_min(tiny)
    length = (before * image).sum(-2, keepdim=True).clamp_min(tiny).sqrt()  # ‖Xv‖, for the last v
    vector.copy_(torch.where(norm > 0, after, vector[..., None]).squeeze(-1))
    return (norm / length)[..., 0, 0]  # ‖XᵀXv‖ / ‖Xv‖: above ‖Xv‖ and below σ₁


def _length(x: Tensor) -> Tensor:
    """The norm of each vector (…, n): (…, 1)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)
