"""Allocating a budget of parameters as ranks of matrices, from their spectra.

All matrices share one threshold: a matrix with a flat spectrum gets a large rank, one with a few dominant values a
small rank. The score of a value is the share of Σσ² that it and smaller values hold (`energy`), or WeLore's normalized
value (`tail`; Jaiswal et al., arXiv 2407.11239).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Shape = tuple[int, int]


def energy_scores(sigma: Tensor) -> Tensor:
    """The share of Σσ² that the values from the i-th on hold: descending from 1."""
    energy = sigma.double() ** 2
    return energy.flip(0).cumsum(0).flip(0) / energy.sum()


def tail_scores(sigma: Tensor) -> Tensor:
    """z_i = (σ_i − σ_q)/(σ_1 − σ_q): descending from 1 to 0; all 0 where the values are equal."""
    sigma = sigma.double()
    spread = sigma[0] - sigma[-1]
    return (sigma - sigma[-1]) / spread if spread > 0 else torch.zeros_like(sigma)


SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {"energy": energy_scores, "tail": tail_scores}


def allocate(spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape], budget: float, by: str) -> dict[str, int]:
    """A rank r ≥ 1 for each matrix, with Σ r(out + in) ≤ budget·Σ out·in.

    Every matrix starts with rank 1. The values of all matrices are then added in the order of their scores; a matrix
    whose next value does not fit gets no more. So the budget is met to within the largest out + in, unless every matrix
    has full rank.

    Args:
        spectra: singular values, descending, by name; their number is the largest rank.
        shapes: (out, in) by name.
        by: `energy` or `tail`.

    Raises:
        ValueError: if rank 1 everywhere exceeds the budget, or a spectrum is zero or not finite.
    """
    for name, sigma in spectra.items():
        if not torch.isfinite(sigma).all() or not sigma[0] > 0:
            raise ValueError(f"the spectrum of {name} is zero or not finite")
    left = budget * sum(math.prod(shapes[name]) for name in spectra) - sum(sum(shapes[name]) for name in spectra)
    if left < 0:
        raise ValueError(f"a budget of {budget:g} is too small: rank 1 in every matrix needs more")
    values = [
        (-float(score), name) for name, sigma in spectra.items() for score in SCORES[by](sigma)[1:]
    ]  # without the first value of each, which is included already
    ranks, closed = dict.fromkeys(spectra, 1), set()
    for _, name in sorted(values):
        cost = sum(shapes[name])
        if name in closed or cost > left:
            closed.add(name)
            continue
        ranks[name] += 1
        left -= cost
    return ranks


def uniform_ranks(shapes: Mapping[str, Shape], budget: float) -> dict[str, int]:
    """The same share of min(out, in) for every matrix, the largest with Σ r(out + in) ≤ budget·Σ out·in."""
    most = budget * sum(map(math.prod, shapes.values()))

    def at(share: float) -> dict[str, int]:
        return {name: max(1, math.floor(share * min(shape))) for name, shape in shapes.items()}

    low, high = 0.0, 1.0
    if factor_parameters(at(high), shapes) <= most:
        return at(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if factor_parameters(at(middle), shapes) <= most else (low, middle)
    return at(low)


def factor_parameters(ranks: Mapping[str, int], shapes: Mapping[str, Shape]) -> int:
    """Σ r(out + in)."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def kept_energy(sigma: Tensor, rank: int) -> float:
    """The share of Σσ² in the `rank` leading values."""
    energy = sigma.double() ** 2
    return float(energy[:rank].sum() / energy.sum())
