"""Orthogonalization and spectral norm of a matrix whose rows are sharded.

Both all-reduce only small products, so that a tall matrix is never gathered.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

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
    """Approximately UVᵀ of the unsharded matrix USVᵀ (m, n), by Newton–Schulz iteration.

    In float32 it works on Gram matrices only, with one collective: an all-reduce of (n, n) if m ≥ n, else an all-gather
    of the matrix. On CUDA it is the usual iteration in bfloat16 with a new Gram matrix in each iteration, because
    updating the Gram matrix, as in float32, would accumulate rounding errors.

    Args:
        x: this process's rows, float32; unchanged.
        rows: `Rows` of the parameter; x may have another number of columns.
        coefficients: of the iteration.

    Returns:
        This process's rows, float32.
    """
    if x.is_cuda:
        return _orthogonalize_bfloat16(x, rows, coefficients)
    if rows.shape[0] >= x.shape[1]:
        return x @ inverse_root(rows.sum(x.mT @ x), coefficients)
    whole = rows.gather(x)
    return rows.cut(inverse_root(whole @ whole.mT, coefficients)) @ whole


def inverse_root(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """The matrix Y (k, k) by which Newton–Schulz iteration multiplies X, for `gram` = XᵀX (or XXᵀ, from the left).

    With A₀ = XᵀX / ‖X‖²_F and Pₖ = aI + bAₖ + cAₖ²: Aₖ₊₁ = Aₖ Pₖ², Y = P₁ ⋯ P₅ / ‖X‖_F. All of these commute. Updating
    Aₖ keeps small singular values accurate; recomputing it as Y A₀ Y in each iteration would not.
    """
    norm_squared = gram.trace().clamp_min(torch.finfo(gram.dtype).tiny)
    a_k = gram / norm_squared
    y = polynomial = _polynomial(a_k, *coefficients[0])
    for abc in coefficients[1:]:
        a_k = polynomial @ a_k @ polynomial
        polynomial = _polynomial(a_k, *abc)
        y = y @ polynomial
    return y / norm_squared.sqrt()


def _polynomial(gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """aI + bA + cA²."""
    found = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    found.diagonal().add_(a)
    return found


def spectral_norm(x: Tensor, rows: Rows, vector: Tensor, iterations: int) -> Tensor:
    """A lower bound on the largest singular value of the unsharded matrix (m, n), by power iteration on XᵀX.

    One all-reduce of (n,) per iteration.

    Args:
        x: this process's rows, float32.
        vector: starting vector (n,), the same on all processes. It is overwritten by the right singular vector of norm
            one, the starting vector for the next call after a small change of the matrix; a zero matrix leaves it as
            is.

    Returns:
        Scalar.
    """
    tiny = torch.finfo(x.dtype).tiny
    largest = x.new_zeros(())
    for _ in range(iterations):
        vector.div_(torch.linalg.vector_norm(vector).clamp_min(tiny))
        image = rows.sum(x.mT @ (x @ vector))
        norm = torch.linalg.vector_norm(image)
        length = vector.dot(image).clamp_min(tiny).sqrt()  # ‖Xv‖, for the previous v
        largest = norm / length  # ‖XᵀXv‖ / ‖Xv‖: above ‖Xv‖ and below σ₁
        vector.copy_(torch.where(norm > 0, image / norm.clamp_min(tiny), vector))
    return largest


def _orthogonalize_bfloat16(x: Tensor, rows: Rows, coefficients: Coefficients) -> Tensor:
    norm = rows.sum(x.square().sum()).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    part = (x / norm).bfloat16()
    if rows.shape[0] >= x.shape[1]:
        return _iterate(part, coefficients, lambda gram: rows.sum(gram.float()).bfloat16()).float()
    return rows.cut(_iterate(rows.gather(part).mT, coefficients, lambda gram: gram).mT).float()


def _iterate(x: Tensor, coefficients: Coefficients, total: Callable[[Tensor], Tensor]) -> Tensor:
    """X ← X (aI + bA + cA²) with A = XᵀX, all-reduced by `total`."""
    for a, b, c in coefficients:
        gram = total(x.mT @ x)
        x = torch.addmm(x, x, torch.addmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return x
