"""Spectron: orthogonalized momenta of factors B and A, in steps that bound what becomes of the norm of B A."""

from typing import Unpack

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from lrtrain.config.ranges import ShareBelowOne
from lrtrain.core.seeds import generator_for
from lrtrain.distributed.sharding import local
from lrtrain.optim.base import Common
from lrtrain.optim.orthogonal import ITERATIONS, Coefficients, Orthogonalization, orthogonalize, spectral_norm
from lrtrain.optim.pairs import FactorPair, PartnerOptimizer
from lrtrain.optim.rows import Rows, rows_like

FIRST = 20


def spectron_direction(
    gradient: Tensor, momentum: Tensor, rows: Rows, beta: float, norms: Tensor, coefficients: Coefficients
) -> Tensor:
    """O/(σ_B + σ_A + 1) with the orthogonal factor O of the momentum, an average of gradients that is updated in place.

    Args:
        gradient, momentum: the rows here of a factor.
        norms: σ_B + σ_A.
        coefficients: of the orthogonalization.
    """
    momentum.lerp_(gradient, 1 - beta)
    return orthogonalize(momentum, rows, coefficients).div_(norms + 1)


class Spectron(PartnerOptimizer[Tensor]):
    """B ← B − ρ O_B and A ← A − ρ O_A with ρ = lr/(σ_B + σ_A + 1), O of the norm 1 and the spectral norms σ of B and A.

    ("Stabilizing Native Low-Rank LLM Pretraining", arXiv 2602.12429.) Then Δ(B A) = −ρ(O_B A + B O_A) + ρ² O_B O_A has
    at most the spectral norm ρ(σ_A + σ_B) + ρ² ≤ lr, for ρ ≤ 1. That is as exact as the norm of O, up to 1.2 by the
    Newton-Schulz iterations, and σ, which power iteration underestimates: it begins with the vector of the last step,
    and in the first step runs `FIRST` iterations. Both factors use the σ from before the step. A step on s·B A, as of
    SLTrain and ReLoRA, is s times as long; with an `lr_ratio` the larger rate bounds it.

    State: one momentum, 4r(m + n) bytes for B (m, r) and A (r, n), and a vector (r,) and (n,) on all processes.

    Args:
        momentum: the decay of the averages.
        iterations: of the power iteration, per step.

    Raises:
        ConfigError: for an unknown orthogonalization.
    """

    optim = "spectron"
    replicated = frozenset({"vector"})

    def __init__(
        self,
        model: nn.Module,
        momentum: ShareBelowOne,
        iterations: PositiveInt,
        orthogonalization: Orthogonalization,
        **common: Unpack[Common],
    ):
        self.coefficients = ITERATIONS[orthogonalization]
        self.momentum = momentum
        self.iterations = iterations
        super().__init__(model, **common)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        start = torch.randn(p.shape[1], generator=generator_for(self.seed, f"{self.names[p]}/vector"))
        return {"momentum": rows_like(p, p.shape[1]), "vector": start.to(p.device)}

    def look(self, pair: FactorPair) -> tuple[Tensor, Tensor]:
        both = (pair.left, pair.right)
        first = max(int(self.local_state(p)["step"]) for p in both) == 1  # whichever of them was counted already
        left, right = (self._norm(p, FIRST if first else self.iterations) for p in both)
        return left + right, left + right

    def _norm(self, p: Tensor, iterations: int) -> Tensor:
        return spectral_norm(local(p).float(), self.rows[p], self.local_state(p)["vector"], iterations)

    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        settings = (self.rows[p], self.momentum, self.known(p), self.coefficients)
        return spectron_direction(gradient, state["momentum"], *settings)
