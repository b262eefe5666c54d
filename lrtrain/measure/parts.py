"""Contributions of L and S to the head and tail of the spectrum of a sparse-plus-low-rank weight W = L + S.

With W = UΣVᵀ the contributions c^L_i = u_iᵀ L v_i and c^S_i = u_iᵀ S v_i add up to σ_i (SLTrain,
Han et al., arXiv 2406.02214, figure 2). Untrained layers look the same, because S is smaller than L:
|σ_i(W) − σ_i(L)| ≤ σ_1(S) and σ_{r+i}(W) ≤ σ_i(S) (Weyl). Effects of training show only in comparison with an untrained
layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lrtrain.linalg.factors import dense_singular_values


@dataclass(frozen=True)
class Contributions:
    """c^L and c^S for the q = min(out, in) singular values of W, and these values; float64, (q,) each."""

    sigma: Tensor
    low_rank: Tensor
    sparse: Tensor


def contributions(low_rank: Tensor, sparse: Tensor) -> Contributions:
    """The contributions of L (out, in) and S (out, in) to each singular value of L + S.

    WWᵀ = UΣ²Uᵀ gives U, and c^L_i = u_iᵀ L Wᵀ u_i/σ_i: one eigenproblem of the smaller side instead of an SVD. Values
    below 1e-7·σ_1 are noise in WWᵀ; their contributions are set to zero.
    """
    if low_rank.shape[0] > low_rank.shape[1]:
        low_rank, sparse = low_rank.T, sparse.T
    low_rank, sparse = low_rank.double(), sparse.double()
    weight = low_rank + sparse
    energy, u = torch.linalg.eigh(weight @ weight.T)
    sigma, u = energy.clamp(min=0).sqrt().flip(0), u.flip(1)
    v = torch.where(sigma > 1e-7 * sigma[0], 1 / sigma, 0.0) * (weight.T @ u)  # (long side, short side)
    return Contributions(sigma, (u * (low_rank @ v)).sum(0), (u * (sparse @ v)).sum(0))


def head_and_tail(
    low_rank: Tensor, sparse: Tensor, rank: int, generator: torch.Generator
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """`head_share` and `tail_share`; their values (`_null`) with the entries of S moved to random places, which the
    sizes of L and S alone explain; `sparse_over_low_rank`, σ_1(S)/σ_r(L); and the contributions `low_rank`, `sparse`
    and their `_null`, (q,) each.

    Empty if W is zero or not finite, and without undefined shares and ratios (rank = min(out, in), L = 0).
    """
    weight = low_rank + sparse
    if not torch.isfinite(weight).all() or not weight.any():
        return {}, {}
    elsewhere = torch.randperm(sparse.numel(), generator=generator).to(sparse.device)
    shuffled = sparse.flatten()[elsewhere].view(sparse.shape)
    shares: dict[str, float | None] = {}
    arrays: dict[str, Tensor] = {}
    for suffix, part in (("", sparse), ("_null", shuffled)):
        found = contributions(low_rank, part)
        arrays |= {f"low_rank{suffix}": found.low_rank, f"sparse{suffix}": found.sparse}
        shares[f"head_share{suffix}"] = head_share(found, rank)
        shares[f"tail_share{suffix}"] = tail_share(found, rank)
    weakest = float(dense_singular_values(low_rank)[rank - 1])
    shares["sparse_over_low_rank"] = float(dense_singular_values(sparse)[0]) / weakest if weakest > 0 else None
    return {name: share for name, share in shares.items() if share is not None}, arrays


def head_share(found: Contributions, rank: int) -> float:
    """Σ_{i≤r} σ_i c^L_i / Σ_{i≤r} σ_i²: the share of L in the r leading values."""
    head = found.sigma[:rank]
    return float((head * found.low_rank[:rank]).sum() / (head**2).sum())


def tail_share(found: Contributions, rank: int) -> float | None:
    """Σ_{i>r} σ_i c^S_i / Σ_{i>r} σ_i²: the share of S in the other values; None if there are none."""
    tail = found.sigma[rank:]
    energy = float((tail**2).sum())
    return float((tail * found.sparse[rank:]).sum()) / energy if energy > 0 else None
