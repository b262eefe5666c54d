"""Bases P (n, r) onto which optimizers project gradients G (m, n), always from the right: G P (m, r).

The projection of a process's rows needs only these rows. Only a basis computed from the gradient itself needs
communication: all-reduces (`total`) of matrices.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""An all-reduce (sum) over the processes that hold the rows; may be in place."""

OVERSAMPLING = 8


def svd_basis(gradient: Tensor, rank: int, total: Total) -> Tensor:
    """The `rank` leading right singular vectors (n, r) of a gradient, from its Gram matrix GᵀG (n, n).

    Args:
        gradient: this process's rows (rows, n).
        total: all-reduce.
    """
    _, vectors = torch.linalg.eigh(total(gradient.T @ gradient))
    return with_signs(vectors[:, -rank:].flip(1))


def randomized_basis(gradient: Tensor, rank: int, generator: torch.Generator, total: Total, powers: int = 2) -> Tensor:
    """Approximately the `rank` leading right singular vectors (n, r), from products with r + 8 vectors.

    The randomized range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4),
    then a Rayleigh-Ritz step that keeps the leading directions within that range.

    Args:
        gradient: this process's rows (rows, n).
        generator: a CPU generator in the same state on all processes.
        total: all-reduce.
        powers: number of further products with GᵀG, each of which suppresses smaller singular values.
    """
    n = gradient.shape[1]
    vectors = torch.randn(n, min(rank + OVERSAMPLING, n), generator=generator).to(gradient)
    for _ in range(1 + powers):
        vectors = torch.linalg.qr(total(gradient.T @ (gradient @ vectors))).Q  # (n, r + 8)
    images = gradient @ vectors  # (rows, r + 8)
    _, within = torch.linalg.eigh(total(images.T @ images))
    return with_signs(vectors @ within[:, -rank:].flip(1))


def with_signs(basis: Tensor) -> Tensor:
    """The basis with the largest entry of each column made positive: moments outlive a basis, so its signs must not
    depend on rounding, which differs between numbers of processes."""
    largest = basis.abs().argmax(0, keepdim=True)
    return basis * basis.gather(0, largest).sign()


def gaussian_basis(n: int, rank: int, seed: int) -> Tensor:
    """A basis (n, r) with entries N(0, 1/r), so that E[P Pᵀ] = I; on the CPU, a function of the arguments only."""
    return torch.randn(n, rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)


def sparse_basis(n: int, rank: int, seed: int) -> Tensor:
    """A basis (n, r) where one in s = √n entries is ±√(s/r) and the others are zero, so that E[P Pᵀ] = I; on the CPU.

    (Li, Hastie and Church, "Very Sparse Random Projections", KDD 2006.) It preserves the norms of dense rows as well as
    a Gaussian basis. Norms of rows with few large entries vary more, and some columns of G are multiplied by zeros
    only.
    """
    s = math.sqrt(n)
    dice = torch.rand(n, rank, generator=torch.Generator().manual_seed(seed))
    signs = (dice < 0.5 / s).float() - (dice >= 1 - 0.5 / s).float()
    return signs * math.sqrt(s / rank)
