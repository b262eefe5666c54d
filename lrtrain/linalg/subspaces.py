"""Comparing subspaces: principal angles and overlap.

Björck & Golub, "Numerical methods for computing angles between linear subspaces", 1973. Two random subspaces of
dimension k in d dimensions have an overlap of k/d, the baseline for a measured overlap.
"""

import math

import torch
from torch import Tensor


def leading_basis(matrix: Tensor, k: int) -> Tensor:
    """The k leading singular vectors (short side, k) in float64 on the shorter side of a matrix (out, in)."""
    matrix = matrix.double()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -k:].flip(1)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """The k angles (radians, ascending) between the spaces of two orthonormal bases (d, k).

    Large angles from their cosines, small ones from their sines, because the arccosine cannot resolve angles below
    √eps.
    """
    first, second = first.double(), second.double()
    shared = first.T @ second
    cosines = torch.linalg.svdvals(shared).clamp(max=1)  # descending, so the angles ascend
    sines = torch.linalg.svdvals(second - first @ shared).clamp(max=1).flip(0)
    return torch.where(cosines > math.sqrt(0.5), torch.asin(sines), torch.acos(cosines))


def overlap(first: Tensor, second: Tensor) -> float:
    """‖UᵀV‖_F²/k, the mean squared cosine of the angles between orthonormal bases (d, k): 1 for the same space."""
    return float((first.double().T @ second.double()).square().sum()) / min(first.shape[1], second.shape[1])


def relative_gap(sigma: Tensor, k: int) -> float:
    """(σ_k − σ_{k+1})/σ_k: below about 5 % the space of the k leading vectors is ill-defined."""
    following = float(sigma[k]) if k < len(sigma) else 0.0
    return 1 - following / float(sigma[k - 1])
