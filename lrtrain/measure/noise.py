"""Comparing spectra with random matrices: the Marchenko–Pastur law, and singular values that exceed it.

A matrix (m, n) of independent entries of standard deviation s has singular values between s(√N ∓ √M), where
N = max(m, n), M = min(m, n). Larger values are spikes: structure that noise does not explain. A product B A of Gaussian
factors exceeds this edge; its noise level is sampled (`product_null_edge`).
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from lrtrain.linalg.factors import product_singular_values

TRACY_WIDOM_99 = 2.0234
"""The 99 % point of the Tracy–Widom law of order 1: the largest value of pure noise lies above in 1 % of the cases."""


def noise_edge(shape: tuple[int, int], std: float) -> float:
    """The largest singular value of noise in the limit of large matrices: s(√N + √M)."""
    return std * (math.sqrt(max(shape)) + math.sqrt(min(shape)))


def finite_noise_edge(shape: tuple[int, int], std: float) -> float:
    """The 99 % quantile of the largest singular value of a Gaussian matrix of this shape.

    Johnstone, "On the distribution of the largest eigenvalue in principal components analysis", 2001: σ_1² is centred
    at s²μ and has the width s²ρ, μ = (√(N−1) + √M)², ρ = (√(N−1) + √M)(1/√(N−1) + 1/√M)^(1/3). For N ≥ 2.
    """
    long, short = math.sqrt(max(shape) - 1), math.sqrt(min(shape))
    center, width = (long + short) ** 2, (long + short) * (1 / long + 1 / short) ** (1 / 3)
    return std * math.sqrt(center + TRACY_WIDOM_99 * width)


def noise_std(sigma: Tensor, shape: tuple[int, int]) -> float:
    """The standard deviation of the noise's entries, from the median of all min(m, n) singular values.

    s = median(σ)/√(N·μ), μ the median of the law at the ratio M/N: spikes move a median less than a mean.

    Raises:
        ValueError: if `sigma` does not have all min(m, n) values.
    """
    if len(sigma) != min(shape):
        raise ValueError(f"{len(sigma)} singular values are not all {min(shape)} of a matrix of shape {shape}")
    return float(sigma.quantile(0.5)) / math.sqrt(max(shape) * noise_median(min(shape) / max(shape)))


@lru_cache
def noise_median(ratio: float) -> float:
    """The median of the eigenvalues of XᵀX/N for X (N, M) of unit variance, M/N = `ratio` in (0, 1]."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = mid − half·cos t makes the density √((x − low)(high − x))/(2π·ratio·x) smooth at both edges.
    t = torch.linspace(0, math.pi, 200_001, dtype=torch.float64)[1:-1]
    x = (low + high) / 2 - (high - low) / 2 * torch.cos(t)
    share = torch.cumsum(torch.sin(t) ** 2 / x, 0)
    return float(x[torch.searchsorted(share, share[-1] / 2)])


def spike_count(sigma: Tensor, shape: tuple[int, int]) -> int:
    """The number of singular values (of all min(m, n)) above the 99 % quantile of noise."""
    return int((sigma > finite_noise_edge(shape, noise_std(sigma, shape))).sum())


def soft_rank(sigma: Tensor, shape: tuple[int, int]) -> float:
    """(edge of the noise / σ_1)², in (0, 1] where there are spikes: 1 is all noise, 0 all structure."""
    return (noise_edge(shape, noise_std(sigma, shape)) / float(sigma[0])) ** 2


def product_null_edge(left: Tensor, right: Tensor, scale: float, generator: torch.Generator, draws: int = 5) -> float:
    """The mean σ_1 of scale·B'A' for Gaussian B', A' of the shapes and entry deviations of B (out, r) and A (r, in)."""

    def noise_like(factor: Tensor) -> Tensor:
        return factor.double().std() * torch.randn(factor.shape, dtype=torch.float64, generator=generator)

    tops = [product_singular_values(noise_like(left), noise_like(right), scale)[0] for _ in range(draws)]
    return float(torch.stack(tops).mean())
