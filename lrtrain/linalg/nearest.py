"""The nearest factors to a given matrix, to initialize a layer from a trained W.

Near in the weights, min ‖W − W'‖_F, or in the outputs over a text, min Σ ‖W x − W' x‖² = ‖(W − W')L‖_F² for the second
moment C = Σ x xᵀ = LLᵀ of its inputs. The best W' of rank r is U_r U_rᵀ W with the leading left singular vectors U_r of
W L; SVD-LLM (arXiv 2403.07378), LoRD (2309.14021) and AFM (2405.18146) come to it by different ways.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrtrain.linalg.factors import dense_singular_values
from lrtrain.linalg.initial import best_factors

RIDGE = 1e-8
"""Share of C's mean eigenvalue added to C, so that unseen inputs have a small weight and L exists."""
ROUNDS = 4
"""Rounds of alternation between low-rank and sparse part; converged to a few parts in a thousand."""
PIECE = 2**24
"""Numbers held at a time when solving small systems."""


class Fit:
    """A norm on errors of W (out, in).

    Args:
        moment: C (in, in), up to a factor; None: the norm of the weights.
    """

    def __init__(self, moment: Tensor | None = None):
        self.moment = self.root = None
        if moment is not None and moment.trace() > 0:
            moment = moment.double()
            identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            self.moment = moment + RIDGE * moment.trace() / len(moment) * identity
            self.root = torch.linalg.cholesky(self.moment)

    def error(self, difference: Tensor) -> float:
        """The norm of an error W − W' (out, in)."""
        return float(self._seen(difference.double()).norm())

    def spectrum(self, weight: Tensor) -> Tensor:
        """The min(out, in) singular values of W L, descending, float64; the best W' of rank r drops those after r."""
        return dense_singular_values(self._seen(weight.double()))

    def low_rank(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), float64, with the nearest BA of rank r; leading directions come first, and columns
        of B and rows of A have equal norms."""
        weight = weight.double()
        if self.root is None:
            return best_factors(weight, rank)
        u = torch.linalg.qr(best_factors(weight @ self.root, rank)[0]).Q  # orthonormal where σ is tiny too
        right = u.T @ weight
        norms = right.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return u * norms, right / norms[:, None]

    def on_support(self, residual: Tensor, positions: Tensor, room: float = PIECE) -> Tensor:
        """The values (nnz,) at row-major `positions`, ascending, of the S that is nearest to the residual (out, in)."""
        if self.moment is None:
            return residual.flatten()[positions]
        rows, columns = positions // residual.shape[1], positions % residual.shape[1]
        counts = torch.bincount(rows, minlength=len(residual))
        most = int(counts.max()) if len(positions) else 0
        place = torch.arange(len(positions), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        padded = columns.new_full((len(residual), most), -1)
        padded[rows, place] = columns  # each row's columns, and −1 behind them
        pieces = [
            self._solve(residual[piece], padded[piece])
            for piece in torch.arange(len(residual), device=rows.device).split(max(1, int(room) // max(1, most**2)))
        ]
        return torch.cat(pieces)[padded >= 0] if most else residual.new_empty(0)

    def _solve(self, residual: Tensor, columns: Tensor) -> Tensor:
        """For each row the s on its columns (rows, k) with C[Ω, Ω] s = C[Ω, :] R_rowᵀ; zero for padding."""
        assert self.moment is not None
        there, columns = columns >= 0, columns.clamp_min(0)
        both = there[:, :, None] & there[:, None, :]
        gram = torch.where(both, self.moment[columns[:, :, None], columns[:, None, :]], 0.0)
        gram += torch.diag_embed((~there).double())
        wanted = torch.where(there, (residual @ self.moment).gather(1, columns), 0.0)
        return torch.linalg.solve(gram, wanted[:, :, None])[:, :, 0]

    def weighted(self, residual: Tensor) -> Tensor:
        """|R_ij|√C_jj (out, in): the effect of each entry of the residual on the outputs."""
        return residual.abs() if self.moment is None else residual.abs() * self.moment.diagonal().sqrt()

    def _seen(self, weight: Tensor) -> Tensor:
        return weight if self.root is None else weight @ self.root


def low_rank_plus_sparse(
    weight: Tensor, rank: int, fit: Fit, support: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """B, A and the values of S on its support, with BA + S near to weight (out, in); float64.

    Each half-step minimizes the error exactly, so it never grows while the support stays the same: hard-impute
    (Mazumder et al., JMLR 2010) with the support's complement observed.

    Args:
        support: residual W − BA (out, in) → ascending row-major positions (nnz,); asked in each round.
    """
    weight = weight.double()
    sparse = torch.zeros_like(weight)
    left = right = values = weight.new_empty(0)
    for _ in range(ROUNDS):
        left, right = fit.low_rank(weight - sparse, rank)
        residual = weight - left @ right
        positions = support(residual)
        values = fit.on_support(residual, positions)
        sparse = torch.zeros_like(weight).put_(positions, values)
    return left, right, values
