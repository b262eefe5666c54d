"""Bases P (n, r) on which optimizers project gradients G (m, n), always from the right: G P (m, r).

So the projection of some rows needs these rows alone. Only a basis that is found from the gradient itself needs all of
them: by sums (`total`) of matrices over the processes, the same on each of them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""The sum of all processes' tensors; may be in place."""

OVERSAMPLING = 8


def svd_basis(gradient: Tensor, rank: int, total: Total) -> Tensor:
    """The `rank` leading right singular vectors (n, r) of a gradient, from its Gram matrix GᵀG (n, n).

    Args:
        gradient: the rows here (rows, n).
        total: sums over the processes.
    """
    _, vectors = torch.linalg.eigh(total(gradient.T @ gradient))
    return with_signs(vectors[:, -rank:].flip(1))


def randomized_basis(gradient: Tensor, rank: int, generator: torch.Generator, total: Total, powers: int = 2) -> Tensor:
    """Nearly the `rank` leading right singular vectors (n, r), from products with r + 8 vectors.

    The randomized range finder with power iterations (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4),
    then a Rayleigh-Ritz step that keeps the leading directions within that range.

    Args:
        gradient: the rows here (rows, n).
        generator: a CPU generator in the same state on all processes.
        total: sums over the processes.
        powers: products with GᵀG after the first, each of which lets the lesser directions fade.
    """
    n = gradient.shape[1]
    vectors = torch.randn(n, min(rank + OVERSAMPLING, n), generator=generator).to(gradient)
    for _ in range(1 + powers):
        vectors = torch.linalg.qr(total(gradient.T @ (gradient @ vectors))).Q  # (n, r + 8)
    images = gradient @ vectors  # (rows, r + 8)
    _, within = torch.linalg.eigh(total(images.T @ images))
    return with_signs(vectors @ within[:, -rank:].flip(1))


def with_signs(basis: Tensor) -> Tensor:
    """The basis with the largest entry of each column positive: moments outlive a basis, so its signs must not hang on
    the last bits of a sum, which differ between numbers of processes."""
    largest = basis.abs().argmax(0, keepdim=True)
    return basis * basis.gather(0, largest).sign()


def gaussian_basis(n: int, rank: int, seed: int) -> Tensor:
    """Independent entries of N(0, 1/r), so that E[P Pᵀ] = I; on the CPU, a function of the arguments alone."""
    return torch.randn(n, rank, generator=torch.Generator().manual_seed(seed)) / math.sqrt(rank)


def sparse_basis(n: int, rank: int, seed: int) -> Tensor:
    """Entries that are zero but for one in s = √n, and else ±√(s/r), so that E[P Pᵀ] = I; on the CPU.

    (Li, Hastie and Church, "Very Sparse Random Projections", KDD 2006.) It keeps the norms of dense rows as well as a
    Gaussian one does. Norms of rows with few large entries scatter more, and some columns of G meet no entry at all.
    """
    s = math.sqrt(n)
    dice = torch.rand(n, rank, generator=torch.Generator().manual_seed(seed))
    signs = (dice < 0.5 / s).float() - (dice >= 1 - 0.5 / s).float()
    return signs * math.sqrt(s / rank)
