"""Initial values shared by several parameterizations."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, because rounding in BLAS and LAPACK depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Entries from U(-bound, bound), float32."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    """Entries from N(0, std²), float32."""
    return torch.empty(shape).normal_(std=std, generator=generator)


def orthonormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A (rows, cols) matrix with orthonormal columns, Haar-distributed (QR of a Gaussian with the signs of R fixed)."""
    q, r = torch.linalg.qr(normal((rows, cols), 1.0, generator))
    return q * r.diagonal().sign()


def gaussian_spectrum(m: int, n: int, std: float) -> Tensor:
    """The singular values (descending) of an (m, n) matrix of N(0, std²) entries, in the limit of large shapes.

    With N = max(m, n) and M = min(m, n) the density of s = σ / (std √N) on [1 - √β, 1 + √β], β = M/N, is
    √((b - s²)(s² - a)) / (π β s) with a, b = (1 ∓ √β)² (Marchenko and Pastur, 1967); the i-th of M values is taken
    at the quantile (i + ½) / M. Returns (M,) float64.
    """
    small, large = min(m, n), max(m, n)
    beta = small / large
    low, high = 1 - math.sqrt(beta), 1 + math.sqrt(beta)
    # s = mid - half·cos(t) keeps the grid dense at both edges, where the density has square roots.
    t = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    s = (low + high) / 2 - (high - low) / 2 * torch.cos(t)
    density = ((high**2 - s**2) * (s**2 - low**2)).clamp_min(0).sqrt() / (math.pi * beta * s.clamp_min(1e-12))
    mass = torch.cumulative_trapezoid(density, s)
    mass = mass / mass[-1]
    quantiles = (torch.arange(small, dtype=torch.float64) + 0.5) / small
    return s[1:][torch.searchsorted(mass, quantiles).clamp_max(len(mass) - 1)].flip(0) * std * math.sqrt(large)


def gaussian_svd(m: int, n: int, rank: int, std: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The leading part U (m, rank), S (rank,) float64, V (n, rank) of the SVD of a random N(0, std²) matrix.

    The singular vectors of a Gaussian matrix are Haar-distributed and independent of its singular values. So vectors
    are drawn directly and values taken from their limit law, without an SVD of an m×n matrix.
    """
    with one_thread():
        left, right = orthonormal(m, rank, generator), orthonormal(n, rank, generator)
    return left, gaussian_spectrum(m, n, std)[:rank], right


def spectral_factors(m: int, n: int, rank: int, std: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B (m, rank) = U √S and A (rank, n) = √S Vᵀ with BA distributed like the best rank-`rank` approximation of a
    random N(0, std²) matrix; see `gaussian_svd`."""
    left, sigma, right = gaussian_svd(m, n, rank, std, generator)
    root = sigma.sqrt().float()
    return left * root, (right * root).T.contiguous()


def best_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B = U √S (m, rank) and A = √S Vᵀ (rank, n), float64: BA is the best approximation of `weight` (m, n).

    From the eigenvectors of the smaller Gram, some six times faster than an SVD. BA is U UᵀW (or W V Vᵀ) to the last
    digits; only the split of a pair with σ < 1e-8 σ_1 between B and A is blurred.
    """
    weight = weight.detach().double()
    if weight.shape[0] > weight.shape[1]:
        left, right = best_factors(weight.T, rank)
        return right.T.contiguous(), left.T.contiguous()
    squares, vectors = torch.linalg.eigh(weight @ weight.T)  # ascending
    sigma = squares.flip(0)[:rank].clamp_min(1e-16 * squares[-1].item() or 1.0).sqrt()
    root = sigma.sqrt()
    u = vectors.flip(1)[:, :rank]
    return u * root, (u.T @ weight) / root[:, None]
