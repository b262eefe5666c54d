"""The methods as published, each layer in a few lines, and what they should take: what benchmarks compare with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.cola import CoLALinear
from lrtrain.layers.lost import LOSTLinear
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.layers.relora import ReLoRALinear
from lrtrain.layers.sltrain import SLTrainLinear
from lrtrain.layers.sparse_support import flat_positions
from lrtrain.layers.sst import SSTLinear


@dataclass
class Contender:
    """One linear in one form."""

    forward: Callable[[Tensor], Tensor]
    parameters: list[Tensor]
    flops: int
    stored: int
    """Bytes of parameters and supports."""
    formula: int | None = None
    """What these should be."""


def costs(module: nn.Module) -> tuple[list[Tensor], int, int]:
    """Trained parameters, FLOPs of a forward and backward pass per token, and bytes of parameters and supports."""
    tensors = [*module.parameters(), *module.buffers()]
    trained: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    if not isinstance(module, FactorizedLinear):
        flops = 6 * tensors[0].numel()
    elif len(trained) < len(list(module.parameters())):
        flops = module.training_flops(1)
    else:
        flops = 3 * module.flops(1)  # at full rank, which `nested` does not always train
    return trained, flops, sum(t.nbytes for t in tensors)


def plain_lowrank(layer: LowRankLinear) -> Contender:
    return Contender(lambda x: linear(linear(x, layer.A.weight), layer.B.weight), *costs(layer))


class PublishedSLTrain(torch.autograd.Function):
    """SLTrain's own: W is composed in both passes and its gradient formed; s is a factor of A."""

    @staticmethod
    def forward(ctx, x, left, right, values, index):
        ctx.save_for_backward(x, left, right, values, index)
        weight = left @ right
        weight.view(-1).scatter_add_(0, index, values)
        return x @ weight.T

    @staticmethod
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, left, right, values, index = ctx.saved_tensors
        weight = left @ right
        weight.view(-1).scatter_add_(0, index, values)
        gradient = g.T @ x
        return g @ weight, gradient @ right.T, left.T @ gradient, gradient.view(-1).gather(0, index), None


def plain_sltrain(layer: SLTrainLinear) -> Contender:
    index = flat_positions(layer.crow, layer.col, layer.block, layer.in_features)  # 64-bit
    parameters, flops, stored = costs(layer)
    stored += index.nbytes - sum(b.nbytes for b in layer.buffers())

    def forward(x: Tensor) -> Tensor:
        return PublishedSLTrain.apply(x, layer.B.weight, layer.scale * layer.A.weight, layer.values, index)  # type: ignore

    return Contender(forward, parameters, flops, stored)


def plain_cola(layer: CoLALinear) -> Contender:
    def forward(x: Tensor) -> Tensor:
        return silu(x @ layer.A.weight.T) @ layer.B.weight.T

    return Contender(forward, *costs(layer))


def plain_lost(layer: LOSTLinear) -> Contender:
    def forward(x: Tensor) -> Tensor:
        low_rank = linear(silu(linear(x, layer.A.weight)), layer.B.weight)
        return layer.gamma * low_rank + (1 - layer.gamma) * (x[:, layer.columns] @ layer.sparse.T)

    return Contender(forward, *costs(layer))


def plain_sst(layer: SSTLinear) -> Contender:
    """U(σ∘(Vᵀx)) with the gradients of all vectors, of which those of the active ones are used."""
    left, right = torch.cat([layer.left, layer.left_frozen]), torch.cat([layer.right, layer.right_frozen])
    left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
    _, flops, stored = costs(layer)
    return Contender(lambda x: (x @ right.T * layer.sigma) @ left, [left, right, layer.sigma], flops, stored)


def plain_relora(layer: ReLoRALinear) -> Contender:
    def forward(x: Tensor) -> Tensor:
        return linear(x, layer.weight) + layer.scale * linear(linear(x, layer.A.weight), layer.B.weight)

    return Contender(forward, *costs(layer))


def lowrank_bytes(layer: FactorizedLinear, itemsize: int) -> int:
    return itemsize * layer.rank * (layer.in_features + layer.out_features)


def lost_bytes(layer: LOSTLinear, itemsize: int) -> int:
    return lowrank_bytes(layer, itemsize) + (itemsize * layer.out_features + 8) * layer.count


def sst_bytes(layer: SSTLinear, itemsize: int) -> int:
    m, n = layer.out_features, layer.in_features
    return min(m, n) * (itemsize * (m + n + 1) + 8)


def relora_bytes(layer: ReLoRALinear, itemsize: int) -> int:
    return lowrank_bytes(layer, itemsize) + itemsize * layer.in_features * layer.out_features


def sltrain_bytes(layer: SLTrainLinear, itemsize: int) -> int:
    m, n, b = layer.out_features, layer.in_features, layer.block
    columns = (2 if n // b <= 2**16 else 4) * layer.nnz // b**2
    pointers = 4 * (m + 1) if layer.support == "uniform" else 0
    return itemsize * (layer.rank * (m + n) + layer.nnz) + columns + pointers


class PublishedGaLore:
    """GaLore's AdamW as its repository has it: one matrix after another, an SVD of the whole gradient every `gap`."""

    def __init__(self, parameters: list[nn.Parameter], rank: int, gap: int):
        self.parameters, self.rank, self.gap, self.steps = parameters, rank, gap, 0
        self.state: dict[Tensor, list[Tensor]] = {}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for p in self.parameters:
            assert p.grad is not None
            tall = p.shape[0] >= p.shape[1]
            if self.steps % self.gap == 0:
                u, _, vh = torch.linalg.svd(p.grad, full_matrices=False)
                basis = vh[: self.rank] if tall else u[:, : self.rank]
                low = torch.zeros(p.shape[0], self.rank) if tall else torch.zeros(self.rank, p.shape[1])
                self.state[p] = [basis, *self.state.get(p, [basis, low, low.clone()])[1:]]
            basis, first, second = self.state[p]
            gradient = p.grad @ basis.T if tall else basis.T @ p.grad
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scaled = first / second.sqrt().add_(1e-6)
            p.add_(0.25 * (scaled @ basis if tall else basis @ scaled), alpha=-lr)
        self.steps += 1


# By name in conf/param; a method needs none of these to be measured.
PLAIN: dict[str, Callable[..., Contender]] = {
    "lowrank": plain_lowrank,
    "sltrain": plain_sltrain,
    "lost": plain_lost,
    "sst": plain_sst,
    "cola": plain_cola,
    "nested": plain_lowrank,
    "relora": plain_relora,
}
FORMULAS: dict[str, Callable[..., int]] = {
    "lowrank": lowrank_bytes,
    "sltrain": sltrain_bytes,
    "lost": lost_bytes,
    "sst": sst_bytes,
    "cola": lowrank_bytes,
    "dlr": lowrank_bytes,
    "nested": lowrank_bytes,
    "relora": relora_bytes,
}
