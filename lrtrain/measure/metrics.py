"""Scalar metrics of one spectrum: pure functions of its singular values.

Notation: `sigma` is a 1-D float64 tensor σ_1 ≥ … ≥ σ_q ≥ 0; λ_i = σ_i². Logarithms are natural, 0·log 0 = 0.
"Effective rank" is computed from σ by some authors and from σ² by others: the names here say which.

For every spectrum: stable rank ≤ participation ratio ≤ effective rank of σ² ≤ effective rank of σ ≤ rank
(exponentials of the Rényi entropies of order ∞, 2, 1 of λ, then order 1 of σ).
"""

import math

import torch
from torch import Tensor

ENERGY_PERCENTS = (90, 95, 99)
WELORE_THRESHOLD = 0.135
"""WeLore's threshold for removing 50 % of LLaMA-2-7B (Jaiswal et al., arXiv 2407.11239)."""
_WORST_CONDITION = 1 / torch.finfo(torch.float64).eps


def summarize(sigma: Tensor, rank_cap: int) -> dict[str, float]:
    """All metrics of one spectrum by leaf name.

    `rank_cap` is the largest rank the matrix can have: r for W = B·A, min(m, n) for a dense W.
    A zero matrix (B = 0 at initialization) has norms but no ratios; one with NaN or Inf has no metrics.
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
        "nuclear_over_spectral": nuclear_norm(sigma) / spectral_norm(sigma),
        "rank_above_1pct": rank_above(sigma, 0.01),
        "welore_ratio": welore_ratio(sigma[:rank_cap], WELORE_THRESHOLD),
        # The logarithm, because one nearly singular layer would dominate a mean over layers.
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
    """exp H(σ²): the effective rank of the energies, which depends less on the tail."""
    return math.exp(entropy(sigma**2))


def stable_rank(sigma: Tensor) -> float:
    """‖W‖_F² / σ_1²."""
    return float(((sigma / sigma[0]) ** 2).sum())


def participation_ratio(sigma: Tensor) -> float:
    """(Σλ)² / Σλ²."""
    energy = (sigma / sigma[0]) ** 2
    return float(energy.sum() ** 2 / (energy**2).sum())


def condition_number(sigma: Tensor) -> float:
    """σ_1 / σ_q; infinite if σ_q = 0."""
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
    # The slack accepts an exact equality in spite of rounding.
    short = cumulative < tau * total * (1 - 1e-12)
    return int(short.sum()) + (1 if total > 0 else 0)


def rank_above(sigma: Tensor, share: float) -> int:
    """#{σ_i > share·σ_1}: a rank that weight decay and the number format do not affect."""
    return int((sigma > share * sigma[0]).sum())


def numerical_rank(sigma: Tensor, shape: tuple[int, int], stored_as: torch.dtype) -> int:
    """#{σ_i > σ_1·max(m, n)·eps}, NumPy's rule, with the eps of the dtype in which the matrix (m, n) is *stored*:
    rounding to that dtype is noise even if the spectrum is computed in float64."""
    return int((sigma > sigma[0] * max(shape) * torch.finfo(stored_as).eps).sum())


def welore_ratio(sigma: Tensor, threshold: float) -> float:
    """The share of values whose z_i = (σ_i − σ_q)/(σ_1 − σ_q) is below `threshold`: large for a heavy tail.

    Jaiswal et al., "From GaLore to WeLore", arXiv 2407.11239. 0 where all values are equal. Exact zeros beyond a
    matrix's possible rank would shift σ_q: leave them out.
    """
    spread = sigma[0] - sigma[-1]
    return float(((sigma - sigma[-1]) < threshold * spread).double().mean()) if spread > 0 else 0.0


def nuclear_norm_bounds(leading: Tensor, squared_frobenius: float, count: int) -> tuple[float, float]:
    """Lower and upper bound of Σσ, from the k leading of `count` values and ‖W‖_F².

    The rest E = ‖W‖_F² − Σ_{i≤k} σ_i² holds at least E/σ_k and at most √((count − k) E).
    """
    known, rest = nuclear_norm(leading), max(0.0, squared_frobenius - float((leading**2).sum()))
    return known + rest / float(leading[-1]), known + math.sqrt((count - len(leading)) * rest)
