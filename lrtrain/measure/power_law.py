"""The power law of a spectrum's tail: p(λ) ∝ λ^−α above λ_min.

Martin & Mahoney, "Implicit self-regularization in deep neural networks", JMLR 2021, and their WeightWatcher; the fit is
that of Clauset, Shalizi & Newman, SIAM Review 2009. A product of Gaussian factors is heavy-tailed before training:
compare α of a low-rank part with that of an untrained one.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST_VALUES = 50


@dataclass(frozen=True)
class PowerLaw:
    alpha: float
    smallest: float
    """λ_min, where the tail begins."""
    distance: float
    """Kolmogorov–Smirnov distance between the tail and the law; small is a good fit."""
    points: int
    """Number of values in the tail."""

    @property
    def error(self) -> float:
        """The standard error of α."""
        return (self.alpha - 1) / math.sqrt(self.points)


def fit_power_law(energy: Tensor, fewest_points: int = 2) -> PowerLaw | None:
    """The power law of λ = σ² (in any order, without zeros) with the λ_min of the smallest distance.

    For each λ_min = λ_(i) with n points above: α = 1 + n/Σ ln(λ_j/λ_min) and the distance
    max_j |1 − (λ_j/λ_min)^(1−α) − (j − i)/n|. None if no candidate has enough distinct points.
    """
    values = energy[energy > 0].double().sort().values
    best: PowerLaw | None = None
    logarithms = values.log()
    for start in range(len(values) - max(fewest_points, 2) + 1):
        above = logarithms[start:] - logarithms[start]
        total, points = float(above.sum()), len(above)
        if total <= 0:
            continue
        alpha = 1 + points / total
        empirical = torch.arange(points, dtype=torch.float64, device=above.device) / points
        distance = float((1 - torch.exp((1 - alpha) * above) - empirical).abs().max())
        if best is None or distance < best.distance:
            best = PowerLaw(alpha, float(values[start]), distance, points)
    return best


def power_law_metrics(sigma: Tensor) -> dict[str, float]:
    """`alpha` with its error and distance, and `alpha_weighted` = α·log₁₀ λ_1, from a tail of at least ten values and
    2 % of the spectrum; empty for fewer than 50 values."""
    energy = sigma[sigma > 0] ** 2
    if len(energy) < FEWEST_VALUES:
        return {}
    law = fit_power_law(energy, max(10, math.ceil(0.02 * len(energy))))
    if law is None:
        return {}
    return {
        "alpha": law.alpha,
        "alpha_error": law.error,
        "alpha_distance": law.distance,
        "alpha_weighted": law.alpha * math.log10(float(energy.max())),
    }
