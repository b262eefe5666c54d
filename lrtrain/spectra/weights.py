"""Singular values of all weights of a model that may be spread over processes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lrtrain.layers.base import FactorizedLinear, gathered_in_turn
from lrtrain.spectra.factors import dense_singular_values
from lrtrain.spectra.metrics import is_finite, is_zero, summarize
from lrtrain.spectra.names import projection_of

LinearLayer = FactorizedLinear | nn.Linear


@torch.no_grad()
def weight_spectra(layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
    """Singular values of each layer's matrix by module name: float64 on the CPU, largest first.

    A collective: every process calls it with the same names and gets the same spectra. Each layer is made whole
    for one process only, which computes its spectrum, so a process holds two whole layers at the most.
    """
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    computed: dict[str, Tensor] = {}
    for names in _rounds(layers, processes):
        mine = gathered_in_turn(layers, names)
        if mine is not None:
            computed[names[rank]] = _singular_values(mine).cpu()
    everywhere = _union(computed)
    return {name: everywhere[name] for name in layers}


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


def _rounds(layers: Mapping[str, LinearLayer], processes: int) -> Iterator[list[str]]:
    """Names for one process each, to be computed at the same time: layers of about the same cost."""
    by_cost = sorted(layers, key=lambda name: (-_cost(layers[name]), name))
    for start in range(0, len(by_cost), processes):
        yield by_cost[start : start + processes]


def _cost(layer: LinearLayer) -> int:
    return min(layer.in_features, layer.out_features) * layer.in_features * layer.out_features


def _singular_values(layer: LinearLayer) -> Tensor:
    return layer.singular_values() if isinstance(layer, FactorizedLinear) else dense_singular_values(layer.weight)


def _union(computed: dict[str, Tensor]) -> dict[str, Tensor]:
    """All processes' results on every process."""
    if not dist.is_initialized():
        return computed
    parts: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, computed)
    return {name: sigma for part in parts for name, sigma in part.items()}


def _count(flags: Iterable[bool]) -> float:
    return float(sum(flags))
