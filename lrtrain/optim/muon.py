"""Muon: orthogonalized momentum (Jordan et al., 2024; scale by Liu et al., "Muon is Scalable", arXiv 2502.16982)."""

from typing import Unpack

from torch import Tensor, nn

from lrtrain.config.ranges import ShareBelowOne
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.common import Common
from lrtrain.optim.groups import MATRICES
from lrtrain.optim.orthogonal import ADJUSTMENTS, ITERATIONS, Adjustment, Orthogonalization, orthogonalize
from lrtrain.optim.rows import rows_like
from lrtrain.optim.stacks import Stack


class Muon(ShardedOptimizer):
    """Muon: B ← μB + (1 − μ)G, W ← W − lr·s·orthogonalized(B), or with nesterov orthogonalized(μB + (1 − μ)G).

    Unlike torch.optim.Muon it does not gather tall matrices, can step in the backward pass, keeps float32 momentum
    for bfloat16 parameters too, and does not modify the momentum while orthogonalizing (torch 2.13 does for bfloat16
    parameters without nesterov). State: mn numbers.
    """

    roles = MATRICES
    stacked = True

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: ShareBelowOne,
        nesterov: bool,
        adjust: Adjustment,
        orthogonalization: Orthogonalization,
        **common: Unpack[Common],
    ):
        self.scale = ADJUSTMENTS[adjust]
        self.coefficients = ITERATIONS[orthogonalization]
        self.momentum = momentum
        self.nesterov = nesterov
        super().__init__(model, **common)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {"momentum": rows_like(p, p.shape[1])}

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        buffer = state["momentum"].lerp_(gradient, 1 - self.momentum)
        ahead = gradient.lerp_(buffer, self.momentum) if self.nesterov else buffer
        return orthogonalize(ahead, stack.rows, self.coefficients).mul_(self.scale(*self.shape(stack.first)))
