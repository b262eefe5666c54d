"""The rank of hidden states: RankMe, matrix nuclear norm and matrix entropy, and streaming moments for them.

All depend on the number of tokens: compare runs of the same architecture on the same tokens.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from lrtrain.linalg.factors import dense_singular_values

SMALLEST_NORM = 1e-12


def rankme(sigma: Tensor, eps: float = 0.0) -> float:
    """exp(−Σ p ln p) with p = σ/Σσ + eps over all given singular values of the states (tokens, width).

    Garrido et al., "RankMe", ICML 2023, arXiv 2210.02885. Their eps is 1e-7, and p is not normalized after adding it,
    so every zero contributes and the result depends on the width.
    """
    p = sigma.double() / sigma.double().sum() + eps
    return math.exp(-float(torch.xlogy(p, p).sum()))


def normalized_rows(hidden: Tensor) -> Tensor:
    """States (tokens, width) minus their mean, each of unit length, in float64."""
    centered = hidden.double() - hidden.double().mean(0)
    return centered / centered.norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)


def matrix_nuclear_norm(hidden: Tensor) -> float:
    """MNN of one sequence's states (L tokens, d): the L or d largest column norms of its normalized rows, over L.

    Li et al., "Large language model evaluation via matrix nuclear-norm", arXiv 2410.10672, as in their code. A cheap
    approximation of ‖X‖_*/L that depends on the choice of axes. NaN for fewer than two tokens.
    """
    tokens, width = hidden.shape
    if tokens < 2:
        return math.nan
    return float(normalized_rows(hidden).norm(dim=0).topk(min(tokens, width)).values.sum()) / tokens


def exact_nuclear_norm(hidden: Tensor) -> float:
    """‖X‖_*/L of the normalized rows X (L, d), which `matrix_nuclear_norm` approximates."""
    return float(dense_singular_values(normalized_rows(hidden)).sum()) / len(hidden) if len(hidden) > 1 else math.nan


def matrix_entropy(hidden: Tensor) -> float:
    """H(e)/ln d, e the eigenvalues of XᵀX/L with X (L, d) the normalized rows: in [0, 1]; NaN below two tokens.

    Wei et al., "Diff-eRank", arXiv 2401.17139, normalized as in the code of arXiv 2410.10672.
    """
    tokens, width = hidden.shape
    if tokens < 2:
        return math.nan
    eigenvalues = dense_singular_values(normalized_rows(hidden)) ** 2 / tokens
    return float(-torch.xlogy(eigenvalues, eigenvalues).sum()) / math.log(width)


class SecondMoment:
    """Σzzᵀ and Σz over a stream of rows z (width,), in float64, for their spectrum without storing rows."""

    def __init__(self, width: int, device: torch.device | None = None):
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows (…, width)."""
        rows = rows.detach().reshape(-1, len(self.sum)).double()
        self.gram.addmm_(rows.T, rows)
        self.sum += rows.sum(0)
        self.count += len(rows)

    def reduce(self) -> None:
        """All-reduce the sums; call once."""
        if dist.is_initialized():
            for part in (self.gram, self.sum, self.count):
                dist.all_reduce(part)

    def singular_values(self, centered: bool) -> Tensor:
        """σ (width,) of all rows, or of all rows minus their mean, descending, accurate down to 1e-8·σ_1. NaN if a row
        was not finite."""
        gram = self.gram - torch.outer(self.sum, self.sum) / self.count if centered else self.gram
        if not torch.isfinite(gram).all():
            return torch.full_like(self.sum, torch.nan)
        return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
