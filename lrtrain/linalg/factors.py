"""Singular values of a matrix, given as two factors or directly, computed in float64."""

import torch
from torch import Tensor

# Squaring doubles the digits a small value needs: below this share of the largest eigenvalue
# a Gram's smallest one has lost six digits or more to rounding.
_RESOLVED = 1e-10
_ROWS = 1024  # converted to float64 at a time: they stay in the cache, and the whole is never held in float64
_BLOCKS = 4  # of columns: a Gram is symmetric, so 10 of its 16 blocks are computed


def product_singular_values(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The r singular values of W = scale·B·A, largest first, without forming W; r ≤ min(out, in).

    With B = `left` (out, r), A = `right` (r, in): the Grams G = BᵀB = LLᵀ and H = AAᵀ are r×r and
    σ² are the eigenvalues of LᵀHL. Cost 2(out + in)r² + O(r³) instead of O(out·in·min(out, in)).
    QR replaces the Grams where these would blur the small values (B = 0, dependent columns).
    A NaN or Inf in a factor gives NaN, since LAPACK raises on them.
    """
    left_gram, right_gram = gram(left), gram(right.T)  # (r, r) each
    if not torch.isfinite(left_gram + right_gram).all():
        return torch.full_like(left_gram.diagonal(), torch.nan)
    sigma = sigma_from_grams(left_gram, right_gram)
    if sigma is None:
        sigma = _sigma_from_qr(left.double(), right.double())
    return abs(scale) * sigma


def dense_singular_values(weight: Tensor) -> Tensor:
    """The min(m, n) singular values of `weight` (m, n), largest first; NaN where it is not finite.

    Roots of the eigenvalues of the smaller of WᵀW and WWᵀ. In float64 this is more accurate for
    float32 weights than a float32 SVD, and faster; values below 1.5e-8·σ_1 are noise.
    """
    square = gram(weight if weight.shape[0] >= weight.shape[1] else weight.T)
    if not torch.isfinite(square).all():
        return torch.full_like(square.diagonal(), torch.nan)
    return _descending_roots(square)


def gram(columns: Tensor) -> Tensor:
    """XᵀX (k, k) of X (d, k), in float64 for any dtype of X."""
    k = columns.shape[1]
    upper = columns.new_zeros(k, k, dtype=torch.float64)
    step = max(1, -(-k // _BLOCKS))
    for rows in columns.detach().split(_ROWS):
        rows = rows.double()
        for start in range(0, k, step):
            upper[start : start + step, start:].addmm_(rows[:, start : start + step].T, rows[:, start:])
    return upper.triu() + upper.triu(1).T


def sigma_from_grams(left_gram: Tensor, right_gram: Tensor) -> Tensor | None:
    """σ (r,) of BA from BᵀB and AAᵀ, finite, both (r, r) in float64; None where these do not resolve the smallest σ."""
    root, failed = torch.linalg.cholesky_ex(left_gram)
    if failed or not _resolved(root.diagonal().square()):
        return None
    sigma = _descending_roots(root.T @ right_gram @ root)
    return sigma if _resolved(sigma.square()) else None


def _sigma_from_qr(left: Tensor, right: Tensor) -> Tensor:
    """σ(BA) = σ(R_B R_Aᵀ) with B = Q_B R_B and Aᵀ = Q_A R_A."""
    left_r = torch.linalg.qr(left, mode="r").R  # (r, r)
    right_r = torch.linalg.qr(right.T, mode="r").R  # (r, r)
    return torch.linalg.svdvals(left_r @ right_r.T)


def _descending_roots(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _resolved(squares: Tensor) -> bool:
    return bool(squares.min() > _RESOLVED * squares.max())
