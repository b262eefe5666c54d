"""The singular values of W = C·R with row-sharded factors, without gathering C.

CᵀC is the sum of the Grams of C's shards, so each process sends k×k numbers instead of its rows of C. R (k, in) is
sharded along k: RRᵀ contains products between all shards and is not a sum over them, so R itself is gathered, on one
process only.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lrtrain.distributed.sharding import local, twin, whole_at
from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.factors import gram, sigma_from_grams


@dataclass(frozen=True)
class Product:
    """CᵀC (k, k) in float64 and R (k, in), which determine the singular values of W = C·R."""

    left_gram: Tensor
    right: Tensor


def sends_gram(layer: FactorizedLinear) -> bool:
    """Whether the Gram of a process's shard of C has fewer bytes than the shard; the same on all processes.

    The upper half of the Gram in float64 has 4k(k + 1) bytes, a shard out/P·k·itemsize: in float32 the Gram is smaller
    up to a rank of about out/P on P processes.
    """
    parameters = [*layer.parameters()]
    if not all(isinstance(p, DTensor) and p.is_floating_point() for p in parameters):
        return False
    if len({p.device_mesh for p in parameters if isinstance(p, DTensor)}) > 1:  # cut for tensor parallelism
        return False
    left = row_shard(layer)
    if left is None or left.shape[1] > layer.in_features:  # the Gram would be singular
        return False
    processes = _group(layer).size()
    return processes > 1 and 4 * (left.shape[1] + 1) * processes < layer.out_features * left.itemsize


def product_at(layer: FactorizedLinear, owner: int) -> Product | None:
    """The `Product` on the process `owner`, None on the others. A collective."""
    rights = {id(layer.get_parameter(name)) for name, role in layer.roles.items() if role == "factor_right"}
    whole = twin(layer, lambda p: whole_at(p, owner) if id(p) in rights else p.detach())
    group = _group(layer)
    if owner not in dist.get_process_group_ranks(group):
        return None
    left = row_shard(layer)
    assert left is not None  # see sends_gram
    square = gram(left)
    upper = torch.triu_indices(*square.shape, device=square.device).unbind()
    packed = square[upper]
    dist.reduce(packed, owner, group=group)
    if owner != dist.get_rank():
        return None
    square[upper] = packed
    return Product(square.triu() + square.triu(1).T, whole.right_factor().detach())


def singular_values_if_resolved(product: Product) -> Tensor | None:
    """σ (k,), NaN if a factor is not finite; None if the Grams do not resolve the smallest values (C = 0, dependent
    columns), which need the unsharded factors."""
    right_gram = gram(product.right.T)
    if not torch.isfinite(product.left_gram + right_gram).all():
        return torch.full_like(right_gram.diagonal(), torch.nan)
    return sigma_from_grams(product.left_gram, right_gram)


def row_shard(layer: FactorizedLinear) -> Tensor | None:
    """This process's rows of C; None if the layer has no such factor."""
    return twin(layer, lambda p: local(p).detach()).left_factor()


def _group(layer: FactorizedLinear) -> dist.ProcessGroup:
    parameter = next(layer.parameters())
    assert isinstance(parameter, DTensor)
    return parameter.device_mesh.get_group(-1)
