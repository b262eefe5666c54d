"""Singular values of all weights of a model that may be spread over processes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean

import torch
from torch import Tensor, nn

from lrtrain.dealing import dealt_layers
from lrtrain.layers.base import FactorizedLinear
from lrtrain.spectra.factors import dense_singular_values
from lrtrain.spectra.metrics import is_finite, is_zero, summarize
from lrtrain.spectra.names import projection_of

LinearLayer = FactorizedLinear | nn.Linear


@torch.no_grad()
def weight_spectra(layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
    """Singular values of each layer's matrix by module name: float64 on the CPU, largest first.

    A collective: every process calls it with the same names and gets the same spectra. Each is computed by one process;
    those that are computed at the same time cost about the same.
    """
    by_cost = {name: layers[name] for name in sorted(layers, key=lambda name: (-_cost(layers[name]), name))}
    found = dict(dealt_layers(by_cost, lambda _, layer: {"sigma": _singular_values(layer).cpu()}))
    return {name: found[name]["sigma"] for name in layers}


def spectra_metrics(spectra: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat metrics of all spectra:

    `spectra/<layer>/<metric>` for each layer, `spectra/summary/<projection>/<metric>_mean` over the layers that
    share the last component of their name (q_proj, …) and under `all` over all of them, and in `spectra_meta/`
    how many matrices were zero or not finite. `erank_rel` is relative to the number of values in the spectrum.
    """
    metrics: dict[str, float] = {}
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for layer, sigma in spectra.items():
        for metric, value in summarize(sigma, rank_cap=len(sigma)).items():
            metrics[f"spectra/{layer}/{metric}"] = value
            groups[f"spectra/summary/{projection_of(layer)}/{metric}_mean"].append(value)
            groups[f"spectra/summary/all/{metric}_mean"].append(value)
    metrics |= {name: fmean(values) for name, values in groups.items()}
    metrics["spectra_meta/zero_matrices"] = _count(is_finite(s) and is_zero(s) for s in spectra.values())
    metrics["spectra_meta/nonfinite"] = _count(not is_finite(s) for s in spectra.values())
    return metrics


def _cost(layer: LinearLayer) -> int:
    return min(layer.in_features, layer.out_features) * layer.in_features * layer.out_features


def _singular_values(layer: LinearLayer) -> Tensor:
    return layer.singular_values() if isinstance(layer, FactorizedLinear) else dense_singular_values(layer.weight)


def _count(flags: Iterable[bool]) -> float:
    return float(sum(flags))
