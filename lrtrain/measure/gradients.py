"""Spectra of gradients of dense weights or of factors.

Nuclear norm and effective rank per projection follow arXiv 2504.10766 (there for single samples, here for the whole
step's gradient over all processes, before clipping). A factorized layer has no G = ∂L/∂W, only G_B = G Aᵀ and
G_A = Bᵀ G, and the change G_B A + B G_A of W by a gradient step on its factors.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lrtrain.core.metrics import Metric, by_layer_and_projection
from lrtrain.distributed.per_layer import as_numbers, as_tensors, compute_layers_across_ranks
from lrtrain.distributed.sharding import twin
from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.factors import dense_singular_values
from lrtrain.linalg.subspaces import leading_basis, overlap
from lrtrain.measure.metrics import effective_rank, is_finite, is_zero
from lrtrain.measure.updates import first_order_update

PREFIXES = {"factor_left": "left_", "factor_right": "right_", "matrix": ""}


class GradientSpectra:
    """Measures gradients, and the overlap of their leading quarter of singular vectors with the last measurement.

    Each process keeps these vectors for the layers that it owns. They are not in checkpoints: after resuming, the
    first measurement has no overlap.
    """

    def __init__(self) -> None:
        self.bases: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def measure(self, layers: Mapping[str, nn.Module]) -> list[Metric]:
        """Metrics of the current gradients of the layers' parameters; a collective."""
        pairs = {}
        for name, layer in layers.items():
            factors = [layer] if isinstance(layer, FactorizedLinear) and layer.factor_pair() else []
            pairs[name] = nn.ModuleList([with_gradients(layer), *factors])
        found = {name: as_numbers(values) for name, values in compute_layers_across_ranks(pairs, self._of_layer)}
        return by_layer_and_projection(found, "gradients")

    def _of_layer(self, name: str, pair: nn.ModuleList) -> dict[str, Tensor]:
        gradients, *factors = pair
        found: dict[str, float] = {}
        for key, prefix in named_matrices(gradients):
            gradient = dict(gradients.named_parameters()).get(key)
            if gradient is not None:
                measured = self._of_matrix((name, key), gradient)
                found |= {prefix + metric: value for metric, value in measured.items()}
        for layer in factors if found else ():
            assert isinstance(layer, FactorizedLinear)
            names = layer.factor_pair() or ()
            sigma = first_order_update(*(of.get_parameter(key) for of in (layer, gradients) for key in names))
            if not is_zero(sigma):
                found["induced_erank"] = effective_rank(sigma)
        return as_tensors(found)

    def _of_matrix(self, place: tuple[str, str], gradient: Tensor) -> dict[str, float]:
        """Metrics of a gradient; none if it is zero or not finite."""
        sigma = dense_singular_values(gradient)
        if not is_finite(sigma) or is_zero(sigma):
            return {}
        quarter = max(1, len(sigma) // 4)
        energy = sigma.square()
        found = {
            "nuclear_norm": float(sigma.sum()),
            "erank": effective_rank(sigma),
            "captured_quarter": float(energy[:quarter].sum() / energy.sum()),
        }
        basis, last = leading_basis(gradient, quarter), self.bases.get(place)
        self.bases[place] = basis.float()
        if last is not None and last.shape == basis.shape:
            found["overlap"] = overlap(last, basis)
        return found


def named_matrices(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, prefix of metrics) of a layer's parameters that are trained matrices."""
    roles = layer.roles if isinstance(layer, FactorizedLinear) else {"weight": "matrix"}
    return ((key, PREFIXES[role]) for key, role in roles.items() if role in PREFIXES)


def with_gradients(module: nn.Module) -> nn.Module:
    """A twin of the module with its (maybe sharded) gradients in place of parameters; None for a missing gradient."""
    return twin(module, lambda p: p.grad)
