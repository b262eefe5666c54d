"""Small models of factorized layers, and gradients for them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lrtrain.layers.lowrank import LowRankLinear


def lowrank(in_features: int, out_features: int, rank: int, bias: bool = True) -> LowRankLinear:
    return LowRankLinear(in_features, out_features, bias, rank, "xavier", 0.02, False, 1.0, rebalance_at=None)


class Model(nn.Module):
    """A block of tall, wide and odd low-rank layers with biases, and a norm."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.own = [lowrank(12, 31, 5), lowrank(33, 8, 3), lowrank(16, 16, 9)]
        self.layers = nn.ModuleList(self.own)
        self.norm = nn.LayerNorm(7)
        dice = torch.Generator().manual_seed(0)
        for layer in self.own:
            layer.load_state_dict(layer.init_parameters(dice))
        self.to(dtype)

    def weights(self) -> list[Tensor]:
        return [layer.dense_weight().detach() for layer in self.own]

    def factors(self) -> list[list[Tensor]]:
        """B and A of each layer."""
        return [[layer.B.weight, layer.A.weight] for layer in self.own]


def gradient(p: Tensor) -> Tensor:
    """As float64."""
    assert p.grad is not None
    return p.grad.double()


def set_gradients(model: nn.Module, steps: int, seed: int = 1) -> Iterator[int]:
    """A drift and noise as each step's gradients, the same in every run."""
    dice = torch.Generator().manual_seed(seed)
    drift = [torch.randn(p.shape, generator=dice) for p in model.parameters()]
    for step in range(1, steps + 1):
        for p, mean in zip(model.parameters(), drift, strict=True):
            p.grad = (mean + 0.3 * torch.randn(p.shape, generator=dice)).to(p)
        yield step
