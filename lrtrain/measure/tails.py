"""A layer's spectrum beside a power law and beside what a random matrix of its shapes would show."""

import torch
from torch import Tensor, nn

from lrtrain.layers.base import FactorizedLinear
from lrtrain.measure.metrics import is_finite, is_zero
from lrtrain.measure.noise import product_null_edge, soft_rank, spike_count
from lrtrain.measure.power_law import power_law_metrics


def fits(layer: nn.Module, shape: tuple[int, int], sigma: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Of a whole layer and its singular values: those of `power_law_metrics`; `spikes`, how many values noise does not
    explain; and `mp_soft_rank` (see `soft_rank`) where all min(out, in) values are known.

    The noise of a whole spectrum is Marchenko and Pastur's, of a product of two factors a drawn one of Gaussian factors
    with the same entries' deviations. Nothing of a spectrum that is zero or not finite."""
    if not is_finite(sigma) or is_zero(sigma):
        return {}
    found = power_law_metrics(sigma)
    left = layer.left_factor() if isinstance(layer, FactorizedLinear) and layer.parts() is None else None
    if left is not None and isinstance(layer, FactorizedLinear):
        edge = product_null_edge(left.detach().cpu(), layer.right_factor().detach().cpu(), 1.0, generator)
        found["spikes"] = float((sigma > edge).sum())
    elif len(sigma) == min(shape) > 1:
        found |= {"spikes": float(spike_count(sigma, shape)), "mp_soft_rank": soft_rank(sigma, shape)}
    return found
