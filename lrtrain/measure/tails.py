"""Comparing a layer's spectrum with a power law and with random matrices of its shapes."""

import torch
from torch import Tensor, nn

from lrtrain.layers.base import FactorizedLinear
from lrtrain.measure.metrics import is_finite, is_zero
from lrtrain.measure.noise import product_null_edge, soft_rank, spike_count
from lrtrain.measure.power_law import power_law_metrics


def fits(layer: nn.Module, shape: tuple[int, int], sigma: Tensor, generator: torch.Generator) -> dict[str, float]:
    """For an unsharded layer and its singular values: `power_law_metrics`; `spikes`, the number of values above noise;
    and `mp_soft_rank` (see `soft_rank`) if all min(out, in) values are given.

    Noise is the Marchenko–Pastur edge for a full spectrum, and for a product of two factors a sampled product of
    Gaussian factors with the same standard deviations. Empty if the spectrum is zero or not finite."""
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
