"""Norms and ranks of a large matrix from a few products with it, with standard errors.

Stochastic Lanczos quadrature (Ubaru, Chen & Saad, SIAM J. Matrix Anal. Appl. 2017): tr f(WWᵀ) = Σ f(λ_i) is the mean
of dim·zᵀf(WWᵀ)z over random unit vectors z, and some Lanczos steps from z give nodes θ and weights ω with
zᵀf(WWᵀ)z ≈ Σ ω f(θ). The few large singular values would make that mean noisy, so their contribution is computed on an
orthonormal basis Q near the leading vectors (Hutch++, Meyer et al. 2021): tr f = Σ q_iᵀ f q_i + (dim − k)·E[zᵀ f z], z
⟂ Q.
"""

import math

import torch
from torch import Tensor

LEADING = 32  # size k of the leading basis Q
PROBES = 16
LEADING_STEPS, STEPS = 8, 40  # Lanczos steps from leading vectors, and from probes: 4·out·in operations each


def estimated_metrics(weight: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Estimated metrics of W (out, in), at least float32, with the names of `metrics.summarize`.

    `<metric>_estimated` and its `_stderr` for nuclear norm, entropy, effective ranks of σ and σ², and participation
    ratio; the spectral norm as a lower bound, and the exact Frobenius norm. A non-finite matrix has no metrics, a zero
    matrix norms only."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    square = float(torch.linalg.vector_norm(wide, dtype=torch.float64)) ** 2
    if not math.isfinite(square):
        return {}
    if square == 0:
        return {"nuclear_norm_estimated": 0.0, "spectral_norm_estimated": 0.0, "frobenius_norm": 0.0}
    leading, probes, top = traces(wide, generator)
    sums = leading + probes  # (probes, functions): each row estimates all traces
    found = {"spectral_norm_estimated": top, "frobenius_norm": math.sqrt(square)}
    found["stable_rank_estimated"] = square / top**2
    for metric, (value, error) in jackknife(sums, square).items():
        found |= {f"{metric}_estimated": value, f"{metric}_estimated_stderr": error}
    return found


def traces(wide: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """For each of `_functions`: the sum over the leading basis (functions,) and (dim − k)·zᵀfz for each probe (probes,
    functions); and σ_1. `wide` is (short side, long side)."""
    dim = len(wide)
    k, count = min(LEADING, dim // 4), PROBES
    basis = leading_vectors(wide, k, generator)
    z = torch.randn(dim, count, generator=generator).to(wide)
    z -= basis @ (basis.T @ z)
    z /= z.norm(dim=0)
    near = lanczos(wide, basis, min(LEADING_STEPS, dim))
    far = lanczos(wide, z, min(STEPS, dim))
    exact, estimates = ((weights[..., None] * _functions(nodes)).sum(1) for nodes, weights in (near, far))
    return exact.sum(0), (dim - k) * estimates, float(near[0].max().sqrt())


def leading_vectors(wide: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis (short, k) near the leading left singular vectors, by two rounds of subspace iteration.

    Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4."""
    basis = torch.randn(len(wide), k, generator=generator).to(wide)
    for _ in range(3):
        basis = torch.linalg.qr(wide @ (wide.T @ torch.linalg.qr(basis).Q)).Q
    return basis


def lanczos(wide: Tensor, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (starts, steps), float64, of the quadrature of WWᵀ for each unit column of `starts` (short
    side, starts).

    Every column has its own Krylov space, fully reorthogonalized; an exhausted one continues with zeros."""
    v, previous = starts, torch.zeros_like(starts)
    beta = starts.new_zeros(starts.shape[1])
    kept, diagonal, beside = [], [], []
    for _ in range(steps):
        kept.append(v)
        w = wide @ (wide.T @ v) - beta * previous
        alpha = (w * v).sum(0)
        w -= alpha * v
        history = torch.stack(kept)  # (steps so far, short, starts)
        w -= torch.einsum("kds,ks->ds", history, torch.einsum("kds,ds->ks", history, w))
        previous, beta = v, w.norm(dim=0)
        diagonal.append(alpha)
        beta = torch.where(beta > 1e-5 * torch.stack(diagonal).amax(0), beta, 0)
        v = torch.where(beta > 0, w / beta.clamp(min=torch.finfo(w.dtype).tiny), 0)
        beside.append(beta)
    off = torch.stack(beside[:-1]).T.double()
    tridiagonal = torch.diag_embed(torch.stack(diagonal).T.double())
    tridiagonal += torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    nodes, vectors = torch.linalg.eigh(tridiagonal)
    return nodes.clamp(min=0), vectors[:, 0, :].square()


def jackknife(sums: Tensor, square: float) -> dict[str, tuple[float, float]]:
    """(value, standard error) of each metric from the traces of each probe (probes, functions). The errors of
    nonlinear metrics follow from leaving out one probe at a time."""
    count = len(sums)
    without = [_metrics((sums.sum(0) - row) / (count - 1), square) for row in sums]
    found = {}
    for metric, value in _metrics(sums.mean(0), square).items():
        others = torch.tensor([values[metric] for values in without], dtype=torch.float64)
        spread = (others - others.mean()).square().sum() * (count - 1) / count
        found[metric] = value, float(spread.sqrt())
    return found


def _functions(energy: Tensor) -> Tensor:
    """σ, σ ln σ, λ, λ ln λ and λ² of λ = σ² (…,) → (…, 5); 0 ln 0 = 0."""
    sigma = energy.sqrt()
    return torch.stack([sigma, torch.xlogy(sigma, sigma), energy, torch.xlogy(energy, energy), energy**2], dim=-1)


def _metrics(sums: Tensor, square: float) -> dict[str, float]:
    """Metrics from the traces of `_functions`. The exact value of Σλ is ‖W‖_F²: scaling by its ratio to the estimate
    removes most of the noise of flat spectra, but is not needed for Σλ², dominated by the leading basis."""
    nuclear, by_sigma, energy, by_energy, fourth = sums.tolist()
    entropy = math.log(nuclear) - by_sigma / nuclear
    return {
        "nuclear_norm": nuclear * math.sqrt(square / energy),
        "entropy": entropy,
        "erank": math.exp(entropy),
        "erank_energy": math.exp(math.log(energy) - by_energy / energy),
        "participation_ratio": square**2 / fourth,
    }
