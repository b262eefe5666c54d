"""Other factors of the same product: B A = (B T)(T⁻¹ A) for any invertible T (r, r), which trains otherwise."""

import torch
from torch import Tensor

from lrtrain.errors import ConfigError


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), σ (r,) descending and Vᵀ (r, n) of B A, for B = `left` (m, r) and A = `right` (r, n); r ≤ min(m, n).

    From QRs of the thin factors and an SVD of (r, r); no (m, n) matrix is formed.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, sigma, vt = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u, sigma, vt @ q_right.T


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """U√Σ (m, r) and √Σ Vᵀ (r, n) with the product B A: BᵀB = AAᵀ = Σ."""
    u, sigma, vt = product_svd(left, right)
    root = sigma.sqrt()
    return u * root, root[:, None] * vt


def left_orthonormal(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """β·U (m, r) and Σ Vᵀ/β (r, n) with the product B A and β = √σ₁.

    (Xiong et al., "How Over-Parameterization Slows Down Gradient Descent in Matrix Sensing", ICLR 2024, arXiv
    2310.01769.) A gradient step on the factors moves B A along U Uᵀ G β² + G V Σ² Vᵀ/β²: from here no direction of
    U is slower than another, whereas in balanced factors each moves in proportion to its σ. With β = √σ₁ both factors
    have the norm √σ₁ that they have when balanced, so the learning rates that are stable stay the same. But what is yet
    to be learned outside of U moves by σ²/β² instead of σ, so it helps once U holds all that matters, not before.
    """
    u, sigma, vt = product_svd(left, right)
    beta = sigma[0].sqrt()
    return u * beta, (sigma / beta)[:, None] * vt


def rebalance_(left: Tensor, right: Tensor) -> None:
    """`left_orthonormal` in place, computed in float64."""
    for factor, new in zip((left, right), left_orthonormal(left.double(), right.double()), strict=True):
        factor.copy_(new)


def check_rebalance(step: int | None) -> None:
    """Raises:
    ConfigError: if this is not a number of steps after which factors can be rebalanced."""
    if step is not None and step < 1:
        raise ConfigError(f"param.rebalance_at={step} must be at least 1, or null for never")
