"""Rebalancing factors: B A = (B T)(T⁻¹ A) for any invertible T (r, r), but each choice trains differently."""

import torch
from torch import Tensor

from lrtrain.layers.base import FactorizedLinear, Reset


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), σ (r,) descending and Vᵀ (r, n) of B A = UΣVᵀ, for B = `left` (m, r) and A = `right` (r, n).

    For r ≤ min(m, n), from QRs of the thin factors and an SVD of (r, r); no (m, n) matrix is formed.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, sigma, vt @ q_right.T


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U√Σ (m, r) and √Σ Vᵀ (r, n), the factors of B A = UΣVᵀ with equal Grams Σ."""
    u, sigma, vt = product_svd(left, right)
    root = sigma.sqrt()
    return u * root, root[:, None] * vt


def left_orthonormal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """β·U (m, r) and Σ Vᵀ/β (r, n), the factors of B A = UΣVᵀ with β = √σ₁.

    (Xiong et al., "How Over-Parameterization Slows Down Gradient Descent in Matrix Sensing", ICLR 2024, arXiv
    2310.01769.) A gradient step on the factors moves B A along U Uᵀ G β² + G V Σ² Vᵀ/β². All directions of U then move
    equally fast, whereas with balanced factors each moves in proportion to its σ. With β = √σ₁ both factors have
    spectral norm √σ₁, as balanced factors have, so the same learning rates are stable. Directions outside of U move by
    σ²/β² instead of σ, so this helps only once U contains the directions to be learned.
    """
    u, sigma, vt = product_svd(left, right)
    if sigma[0] == 0:  # B A = 0: nothing to rebalance
        return left, right
    beta = sigma[0].sqrt()
    return u * beta, (sigma / beta)[:, None] * vt


class RebalancedLinear(FactorizedLinear):
    """A layer whose factor pair is rebalanced once by `left_orthonormal`, with a reset of its optimizer state.

    Args:
        rebalance_at: the step after which to rebalance; None: never.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, rebalance_at: int | None):
        super().__init__(in_features, out_features, rank)
        self.rebalance_at = rebalance_at

    def revision_due(self, step: int) -> bool:
        return step == self.rebalance_at

    def revise(self, step: int, generator: torch.Generator) -> None:
        factors = [self.get_parameter(name) for name in self.factor_pair() or ()]
        for factor, new in zip(factors, left_orthonormal(*(f.double() for f in factors)), strict=True):
            factor.copy_(new)

    def resets(self, step: int) -> dict[str, Reset]:
        return {name: Reset() for name in self.factor_pair() or ()}
