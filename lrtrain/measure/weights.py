"""Singular values of all weights of a model that may be sharded."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from lrtrain.core.metrics import Metric, by_layer_and_projection, scalars
from lrtrain.core.seeds import generator_for
from lrtrain.distributed.per_layer import as_numbers, as_tensors, compute_layers_across_ranks
from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.factors import dense_singular_values
from lrtrain.measure.estimates import estimated_metrics
from lrtrain.measure.metrics import summarize
from lrtrain.measure.movement import linear_map
from lrtrain.measure.parts import head_and_tail
from lrtrain.measure.shards import Product, product_at, sends_gram, singular_values_if_resolved
from lrtrain.measure.tails import fits
from lrtrain.model.experts import DenseExperts

LinearLayer = FactorizedLinear | nn.Linear | DenseExperts
L = TypeVar("L", bound=LinearLayer)


@torch.no_grad()
def weight_spectra(layers: Mapping[str, LinearLayer]) -> dict[str, Tensor]:
    """Singular values of each layer's matrix by module name: float64, on the CPU, descending; of experts (experts, …).

    A collective: every process calls it with the same names and gets the same spectra. Each is computed by one process;
    those that are computed at the same time cost about the same. Where a Gram of row shards is fewer bytes than the
    shards it travels in their place.
    """
    by_cost = {name: layers[name] for name in sorted(layers, key=lambda name: (-_cost(layers[name]), name))}
    by_gram = {
        name: layer for name, layer in by_cost.items() if isinstance(layer, FactorizedLinear) and sends_gram(layer)
    }
    found = {name: of["sigma"] for name, of in compute_layers_across_ranks(by_gram, _from_grams, product_at) if of}
    rest = {name: layer for name, layer in by_cost.items() if name not in found}
    found |= {name: of["sigma"] for name, of in compute_layers_across_ranks(rest, _from_layer)}
    return {name: found[name] for name in layers}


@torch.no_grad()
def weight_estimates(layers: Mapping[str, LinearLayer]) -> dict[str, dict[str, float]]:
    """What `estimated_metrics` says of each layer's matrix. A collective, as `weight_spectra`; always with the same
    probes for a layer, so that two measurements differ by what changed."""

    def estimate(name: str, layer: LinearLayer) -> dict[str, Tensor]:
        weight = linear_map(layer).float()
        found = [
            estimated_metrics(matrix, generator_for(0, f"estimate of {name}"))
            for matrix in (weight if weight.ndim == 3 else [weight])
        ]
        return as_tensors(mean_metrics(found))

    return {name: as_numbers(values) for name, values in compute_layers_across_ranks(layers, estimate)}


def too_large(layers: Mapping[str, L], exact_up_to: int | None) -> dict[str, L]:
    """The layers whose spectra are estimated: those that need a larger eigenproblem solved."""
    return {name: layer for name, layer in layers.items() if exact_up_to is not None and _size(layer) > exact_up_to}


def spectra_metrics(
    spectra: Mapping[str, Tensor], estimates: Mapping[str, Mapping[str, float]] = MappingProxyType({})
) -> list[Metric]:
    """Metrics of all spectra, and of layers that have estimates in their place:

    `spectra/<layer>/<metric>` for each layer, `spectra/summary/<projection>/<metric>_mean` over the layers that
    share the last component of their name (q_proj, …) and under `all` over all of them, and in `spectra_meta/`
    how many layers were zero or not finite. Those of experts are means over them. `erank_rel` is relative to the number
    of values in the spectrum.
    """
    exact = {
        name: mean_metrics([summarize(s, len(s)) for s in torch.atleast_2d(sigma)]) for name, sigma in spectra.items()
    }
    metrics = by_layer_and_projection({**exact, **estimates}, "spectra")
    found = [*exact.values(), *estimates.values()]
    zero = float(sum(values.get("frobenius_norm") == 0 for values in found))
    return metrics + scalars("spectra_meta", {"zero_matrices": zero, "nonfinite": float(sum(not of for of in found))})


def mean_metrics(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over the matrices that have it all; of one matrix its own."""
    shared = [key for key in found[0] if all(key in of for of in found)]
    return {key: fmean(of[key] for of in found) for key in shared}


def single(layers: Mapping[str, L]) -> dict[str, L]:
    """The layers that hold one matrix: all but experts."""
    return {name: layer for name, layer in layers.items() if getattr(layer, "batch", 1) == 1}


def matching(layers: Mapping[str, L], pattern: str | None) -> dict[str, L]:
    """The layers in whose name the regular expression `pattern` is found; none if it is None."""
    return {name: layer for name, layer in layers.items() if pattern is not None and re.search(pattern, name)}


@torch.no_grad()
def part_metrics(layers: Mapping[str, LinearLayer]) -> tuple[list[Metric], dict[str, Tensor]]:
    """`head_share`, `tail_share` and their nulls (see `head_and_tail`) of the sparse-plus-low-rank layers among these,
    named as in `spectra_metrics`; and by `<layer>/<name>` what L and S contribute to each singular value. A collective;
    it costs several times what spectra do."""
    chosen = {name: layer for name, layer in layers.items() if isinstance(layer, FactorizedLinear)}

    def shares(name: str, layer: FactorizedLinear) -> dict[str, Tensor]:
        parts = _upcast(layer).parts()
        if parts is None:
            return {}
        found, arrays = head_and_tail(*parts, layer.rank, generator_for(0, f"null of {name}"))
        return as_tensors(found) | {key: array.cpu() for key, array in arrays.items()}

    found = dict(compute_layers_across_ranks(chosen, shares))
    shares_of = {name: as_numbers({k: v for k, v in of.items() if v.dim() == 0}) for name, of in found.items()}
    arrays = {f"{name}/{key}": v for name, of in found.items() for key, v in of.items() if v.dim()}
    return by_layer_and_projection(shares_of, "spectra"), arrays


@torch.no_grad()
def tail_metrics(layers: Mapping[str, LinearLayer], spectra: Mapping[str, Tensor]) -> list[Metric]:
    """What power laws and pure noise say of the spectra of those of the layers that have one (see `fits`), named as in
    `spectra_metrics`. A collective."""

    def measure(name: str, layer: LinearLayer) -> dict[str, Tensor]:
        shape = (layer.out_features, layer.in_features)
        return as_tensors(fits(_upcast(layer), shape, spectra[name], generator_for(0, f"noise of {name}")))

    chosen = {name: layer for name, layer in layers.items() if name in spectra}
    found = {name: as_numbers(values) for name, values in compute_layers_across_ranks(chosen, measure)}
    return by_layer_and_projection(found, "spectra")


def _cost(layer: LinearLayer) -> int:
    size = layer.in_features * layer.out_features
    return getattr(layer, "batch", 1) * min(layer.in_features, layer.out_features) * size


def _size(layer: LinearLayer) -> int:
    return layer.spectrum_size if isinstance(layer, FactorizedLinear) else min(layer.in_features, layer.out_features)


def _from_grams(_: str, product: Product) -> dict[str, Tensor]:
    """Nothing where the whole factors are needed."""
    sigma = singular_values_if_resolved(product)
    return {} if sigma is None else {"sigma": sigma.cpu()}


def _from_layer(_: str, layer: LinearLayer) -> dict[str, Tensor]:
    layer = _upcast(layer)
    if isinstance(layer, FactorizedLinear):
        sigma = layer.singular_values()
    elif isinstance(layer, DenseExperts):
        sigma = torch.stack([dense_singular_values(weight) for weight in layer.weight])
    else:
        sigma = dense_singular_values(layer.weight)
    return {"sigma": sigma.cpu()}


def _upcast(twin: L) -> L:
    """The twin that `compute_layers_across_ranks` made, with float32 parameters where they are stored in fewer bits."""
    for p in twin.parameters():
        p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return twin
