"""A model whose rows and columns no number of processes divides, and steps of an optimizer on it."""

from collections.abc import Iterable

import torch
from launching import SMALL
from torch import nn

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.distributed.sharding import local
from lrtrain.engine.base import ShardedOptimizer
from lrtrain.layers.lowrank import LowRankLinear


class Factors(nn.Module):
    """Two low-rank layers of odd shapes, a norm, and an embedding large enough to be quantized."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        own = [LowRankLinear(n, m, False, 5, "xavier", 0.02, False, 1.0, None) for n, m in ((23, 17), (12, 29))]
        dice = torch.Generator().manual_seed(0)
        for layer in own:
            layer.load_state_dict(layer.init_parameters(dice))
        self.layers = nn.ModuleList(own)
        self.norm = nn.LayerNorm(7)
        self.embed = nn.Embedding.from_pretrained(torch.randn(131, 33, generator=dice), freeze=False)
        self.to(dtype)


def made(optim: str, seed: int, model: nn.Module, *more: str) -> ShardedOptimizer:
    """The optimizer of this name in conf/optim."""
    return choice(compose(*SMALL, "param=lowrank", f"optim={optim}", f"train.seed={seed}", *more).optim)(model)


def stepped(optim: str, seed: int, model: nn.Module, steps: int = 3) -> ShardedOptimizer:
    """The optimizer after some steps along random gradients."""
    optimizer = made(optim, seed, model)
    step_along(optimizer, range(steps))
    return optimizer


def step_along(optimizer: ShardedOptimizer, steps: Iterable[int]) -> None:
    """Take steps along gradients that are a function of the step alone."""
    for step in steps:
        dice = torch.Generator().manual_seed(step)
        for p, rows in optimizer.rows.items():
            p.grad = torch.zeros_like(p)
            local(p.grad).copy_(rows.cut(torch.randn(rows.shape, generator=dice)))
        optimizer.step()
