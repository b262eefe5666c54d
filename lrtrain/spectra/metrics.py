"""Scalar metrics of one spectrum: pure functions of its singular values.

Notation: `sigma` is a 1-D float64 tensor σ_1 ≥ … ≥ σ_q ≥ 0; λ_i = σ_i². Logarithms are natural, 0·log 0 = 0.
"Effective rank" is not standardised, some compute it from σ and some from σ²: the names here say which.

For every spectrum: stable rank ≤ participation ratio ≤ effective rank of σ² ≤ effective rank of σ ≤ rank
(exponentials of the Rényi entropies of order ∞, 2, 1 of λ, then order 1 of σ).
"""

import math

import torch
from torch import Tensor

ENERGY_PERCENTS = (90, 95, 99)
_WORST_CONDITION = 1 / torch.finfo(torch.float64).eps


def summarize(sigma: Tensor, rank_cap: int) -> dict[str, float]:
    """All metrics of one spectrum by leaf name.

    `rank_cap` is the largest rank the matrix can have: r for W = B·A, min(m, n) for a dense W.
    A zero matrix (B = 0 at the start) has norms but no ratios; one with NaN or Inf has nothing.
    """
    if not is_finite(sigma):
        return {}
    norms = {
        "nuclear_norm": nuclear_norm(sigma),
        "spectral_norm": spectral_norm(sigma),
        "frobenius_norm": frobenius_norm(sigma),
    }
    norms |= {f"energy_rank_{percent}": energy_rank(sigma, percent / 100) for percent in ENERGY_PERCENTS}
    if is_zero(sigma):
        return norms
    return norms | {
        "entropy": entropy(sigma),
        "erank": effective_rank(sigma),
        "erank_energy": effective_rank_energy(sigma),
        "erank_rel": effective_rank(sigma) / rank_cap,
        "stable_rank": stable_rank(sigma),
        "participation_ratio": participation_ratio(sigma),
        # The logarithm, since one nearly singular layer would hide all others in a mean over layers.
        "log10_condition": math.log10(min(condition_number(sigma[:rank_cap]), _WORST_CONDITION)),
    }


def is_finite(sigma: Tensor) -> bool:
    return bool(torch.isfinite(sigma).all())


def is_zero(sigma: Tensor) -> bool:
    return spectral_norm(sigma) == 0


def entropy(sigma: Tensor) -> float:
    """H = −Σ p_i ln p_i in nats, p_i = σ_i / Σσ."""
    p = sigma / sigma.sum()
    return float(-torch.xlogy(p, p).sum())


def effective_rank(sigma: Tensor) -> float:
    """exp H(σ), in [1, rank] (Roy & Vetterli 2007)."""
    return math.exp(entropy(sigma))


def effective_rank_energy(sigma: Tensor) -> float:
    """exp H(σ²): as `effective_rank`, but of the energies, so it reads the tail less."""
    return math.exp(entropy(sigma**2))


def stable_rank(sigma: Tensor) -> float:
    """‖W‖_F² / σ_1²."""
    return float(((sigma / sigma[0]) ** 2).sum())


def participation_ratio(sigma: Tensor) -> float:
    """(Σλ)² / Σλ²."""
    energy = (sigma / sigma[0]) ** 2
    return float(energy.sum() ** 2 / (energy**2).sum())


def condition_number(sigma: Tensor) -> float:
    """σ_1 / σ_q; infinite where σ_q = 0."""
    return float(sigma[0] / sigma[-1])


def nuclear_norm(sigma: Tensor) -> float:
    """Σσ."""
    return float(sigma.sum())


def spectral_norm(sigma: Tensor) -> float:
    """σ_1."""
    return float(sigma[0])


def frobenius_norm(sigma: Tensor) -> float:
    """√Σσ²."""
    return float(torch.linalg.vector_norm(sigma))


def energy_rank(sigma: Tensor, tau: float) -> int:
    """The fewest leading values that hold the share `tau` of Σσ²; 0 for a zero matrix."""
    cumulative = torch.cumsum(sigma**2, 0)
    total = float(cumulative[-1])
    # The slack lets an exact equality pass that rounding of the sum would miss.
    short = cumulative < tau * total * (1 - 1e-12)
    return int(short.sum()) + (1 if total > 0 else 0)
