"""A sparse-plus-low-rank weight W = L + S taken apart: who makes the head of its spectrum, and who the tail.

With W = UΣVᵀ the contributions c^L_i = u_iᵀ L v_i and c^S_i = u_iᵀ S v_i add up to σ_i: the picture of SLTrain
(Han et al., arXiv 2406.02214, figure 2). Untrained layers show the same picture, since S is the smaller of the two:
|σ_i(W) − σ_i(L)| ≤ σ_1(S) and σ_{r+i}(W) ≤ σ_i(S) (Weyl). What training changed shows only beside an untrained layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Contributions:
    """c^L and c^S of the min(out, in) singular values of W, and these; float64, (q,) each."""

    sigma: Tensor
    low_rank: Tensor
    sparse: Tensor


def contributions(low_rank: Tensor, sparse: Tensor) -> Contributions:
    """What L (out, in) and S (out, in) contribute to each singular value of L + S; one full SVD."""
    low_rank, sparse = low_rank.double(), sparse.double()
    u, sigma, vh = torch.linalg.svd(low_rank + sparse, full_matrices=False)
    return Contributions(sigma, ((u.T @ low_rank) * vh).sum(1), ((u.T @ sparse) * vh).sum(1))


def head_share(found: Contributions, rank: int) -> float:
    """Σ_{i≤r} σ_i c^L_i / Σ_{i≤r} σ_i²: what L makes of the r leading values; 1 is all."""
    head = found.sigma[:rank]
    return float((head * found.low_rank[:rank]).sum() / (head**2).sum())


def tail_share(found: Contributions, rank: int) -> float | None:
    """Σ_{i>r} σ_i c^S_i / Σ_{i>r} σ_i²: what S makes of the others; None where there are none."""
    tail = found.sigma[rank:]
    energy = float((tail**2).sum())
    return float((tail * found.sparse[rank:]).sum()) / energy if energy > 0 else None


def energy_in_columns(matrix: Tensor, basis: Tensor) -> float:
    """‖QᵀM‖_F²/‖M‖_F²: the share of M (out, in) within the space of Q (out, r), orthonormal; r/out for noise."""
    return float((basis.double().T @ matrix.double()).square().sum() / matrix.double().square().sum())
