"""The change of each weight by training: W_t − W_0 and W_t − W_{t−k}, and the rotation of its leading subspace.

W_0 is regenerated from the seed, also in a resumed run; W_{t−k} is the weight at the last measurement, of which
each process keeps its shard (so the first measurement after resuming has none).
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrtrain.core.metrics import Metric, by_layer_and_projection
from lrtrain.distributed.per_layer import as_numbers, as_tensors, compute_layers_across_ranks
from lrtrain.distributed.sharding import twin
from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.factors import dense_singular_values
from lrtrain.linalg.subspaces import leading_basis, overlap, principal_angles
from lrtrain.measure.metrics import effective_rank, is_zero


class Movement:
    """Measures the updates of weights.

    Args:
        initial: layer name → the layer with its initial values, unsharded, on the CPU; None if they are unknown.
    """

    def __init__(self, initial: Callable[[str], nn.Module] | None):
        self.initial = initial
        self.last: dict[str, nn.Module] = {}  # sharded like the trained layers

    @torch.no_grad()
    def measure(self, layers: Mapping[str, nn.Module]) -> list[Metric]:
        """Metrics of the updates so far, and of those since the last call. A collective."""
        pairs = {
            name: nn.ModuleList([layer, *([self.last[name]] if name in self.last else [])])
            for name, layer in layers.items()
        }
        found = {name: as_numbers(values) for name, values in compute_layers_across_ranks(pairs, self._of_layer)}
        self.last = {name: twin(layer, lambda p: p.detach().clone()) for name, layer in layers.items()}
        return by_layer_and_projection(found, "updates")

    def _of_layer(self, name: str, moments: nn.ModuleList) -> dict[str, Tensor]:
        layer, *last = moments
        rank = layer.rank if isinstance(layer, FactorizedLinear) else min(layer.get_parameter("weight").shape)
        now = linear_map(layer).cpu()
        if not torch.isfinite(now).all():
            return {}
        found = {}
        if self.initial is not None:
            found |= compare(linear_map(self.initial(name)), now, max(1, rank // 4), "start")
        for before in (linear_map(moment).cpu() for moment in last):
            if torch.isfinite(before).all():
                found |= compare(before, now, max(1, rank // 4), "last")
        return as_tensors(found)


def compare(before: Tensor, now: Tensor, k: int, since: str) -> dict[str, float]:
    """Effective rank and size of the update now − before (out, in); overlap and largest angle (radians) of the
    spaces of the k leading singular vectors. No metrics without a change, no ratio to a zero matrix."""
    update = now - before
    sigma = dense_singular_values(update)
    if is_zero(sigma):
        return {}
    found = {
        f"erank_since_{since}": effective_rank(sigma),
        f"spectral_norm_since_{since}": float(sigma[0]),
    }
    if before.any() and now.any():
        bases = leading_basis(before, k), leading_basis(now, k)
        found |= {
            f"relative_since_{since}": float(update.norm() / before.norm()),
            f"overlap_with_{since}": overlap(*bases),
            f"angle_with_{since}": float(principal_angles(*bases)[-1]),
        }
    return found


def linear_map(layer: nn.Module) -> Tensor:
    """W (out, in) in float64; a nonlinear layer takes its activation as the identity."""
    layer = copy.deepcopy(layer).double()
    if not isinstance(layer, FactorizedLinear):
        weight = layer.get_parameter("weight")
        return weight.T if isinstance(layer, Conv1D) else weight
    if hasattr(layer, "activation"):
        vars(layer)["activation"] = "none"
    return layer.dense_weight()
