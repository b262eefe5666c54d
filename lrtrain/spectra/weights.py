"""Singular values of all weights of a model that may be spread over processes."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lrtrain.dealing import dealt_layers
from lrtrain.initialize import generator_for
from lrtrain.layers.base import FactorizedLinear
from lrtrain.spectra.factors import dense_singular_values
from lrtrain.spectra.metrics import is_finite, is_zero, summarize
from lrtrain.spectra.names import by_layer_and_projection
from lrtrain.spectra.parts import head_and_tail

LinearLayer = FactorizedLinear | nn.Linear
L = TypeVar("L", bound=LinearLayer)


@torch.no_grad()
def weight_spectra(layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
    """Singular values of each layer's matrix by module name: float64 on the CPU, largest first.

    A collective: every process calls it with the same names and gets the same spectra. Each is computed by one process;
    those that are computed at the same time cost about the same.
    """
    by_cost = {name: layers[name] for name in sorted(layers, key=lambda name: (-_cost(layers[name]), name))}
    found = dict(dealt_layers(by_cost, lambda _, layer: {"sigma": _singular_values(_upcast(layer)).cpu()}))
    return {name: found[name]["sigma"] for name in layers}


def spectra_metrics(spectra: Mapping[str, Tensor]) -> dict[str, float]:
    """Flat metrics of all spectra:

    `spectra/<layer>/<metric>` for each layer, `spectra/summary/<projection>/<metric>_mean` over the layers that
    share the last component of their name (q_proj, …) and under `all` over all of them, and in `spectra_meta/`
    how many matrices were zero or not finite. `erank_rel` is relative to the number of values in the spectrum.
    """
    metrics = by_layer_and_projection(
        {name: summarize(sigma, len(sigma)) for name, sigma in spectra.items()}, "spectra"
    )
    metrics["spectra_meta/zero_matrices"] = _count(is_finite(s) and is_zero(s) for s in spectra.values())
    metrics["spectra_meta/nonfinite"] = _count(not is_finite(s) for s in spectra.values())
    return metrics


def matching(layers: Mapping[str, L], pattern: str | None) -> dict[str, L]:
    """The layers in whose name the regular expression `pattern` is found; none if it is None."""
    return {name: layer for name, layer in layers.items() if pattern is not None and re.search(pattern, name)}


@torch.no_grad()
def part_metrics(layers: Mapping[str, LinearLayer]) -> dict[str, float]:
    """`head_share`, `tail_share` and their nulls (see `head_and_tail`) of the sparse-plus-low-rank layers among these,
    named as in `spectra_metrics`. A collective; it costs several times what spectra do."""
    chosen = {name: layer for name, layer in layers.items() if isinstance(layer, FactorizedLinear)}

    def shares(name: str, layer: FactorizedLinear) -> dict[str, Tensor]:
        parts = _upcast(layer).parts()
        if parts is None:
            return {}
        found = head_and_tail(*parts, layer.rank, generator_for(0, f"null of {name}"))
        return {metric: torch.tensor(value, dtype=torch.float64) for metric, value in found.items()}

    found = {name: {k: v.item() for k, v in values.items()} for name, values in dealt_layers(chosen, shares)}
    return by_layer_and_projection(found, "spectra")


def _cost(layer: LinearLayer) -> int:
    return min(layer.in_features, layer.out_features) * layer.in_features * layer.out_features


def _singular_values(layer: LinearLayer) -> Tensor:
    return layer.singular_values() if isinstance(layer, FactorizedLinear) else dense_singular_values(layer.weight)


def _upcast(twin: L) -> L:
    """The twin that `dealt_layers` made, with float32 parameters where they are stored in fewer bits."""
    for p in twin.parameters():
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return twin


def _count(flags: Iterable[bool]) -> float:
    return float(sum(flags))
