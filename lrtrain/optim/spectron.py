"""Spectron: orthogonalized momenta of factors B and A, with a bound on the norm of each step on B A."""

from typing import Unpack

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from lrtrain.config.ranges import ShareBelowOne
from lrtrain.core.seeds import generator_for
from lrtrain.distributed.sharding import local
from lrtrain.optim.common import Common
from lrtrain.optim.orthogonal import ITERATIONS, Coefficients, Orthogonalization, orthogonalize, spectral_norm
from lrtrain.optim.pairs import PartnerOptimizer
from lrtrain.optim.rows import Rows, rows_like
from lrtrain.optim.stacks import Stack

FIRST = 20


def spectron_direction(
    gradient: Tensor, momentum: Tensor, rows: Rows, beta: float, norms: Tensor, coefficients: Coefficients
) -> Tensor:
    """O/(σ_B + σ_A + 1) with the orthogonal factor O of the momentum, an average of gradients updated in place.

    Args:
        gradient, momentum: this process's rows of a factor, or of those of a stack.
        norms: σ_B + σ_A ([members]).
        coefficients: of the orthogonalization.
    """
    momentum.lerp_(gradient, 1 - beta)
    return orthogonalize(momentum, rows, coefficients).div_((norms + 1)[..., None, None])


class Spectron(PartnerOptimizer):
    """B ← B − ρ O_B and A ← A − ρ O_A with ρ = lr/(σ_B + σ_A + 1), ‖O‖ = 1 and the spectral norms σ of B and A.

    ("Stabilizing Native Low-Rank LLM Pretraining", arXiv 2602.12429.) Δ(B A) = −ρ(O_B A + B O_A) + ρ² O_B O_A then has
    a spectral norm of at most ρ(σ_A + σ_B) + ρ² ≤ lr, for ρ ≤ 1. The bound is approximate: Newton–Schulz iterations
    give ‖O‖ up to 1.2, and power iteration underestimates σ. It starts with the vector of the last step, and runs
    `FIRST` iterations in the first step. Both factors use the σ from before the step. A step on s·B A (SLTrain, ReLoRA)
    is s times as long; with an `lr_ratio` the larger learning rate bounds it.

    State: one momentum, 4r(m + n) bytes for B (m, r) and A (r, n), and a vector (r,) and (n,) on all processes.

    Args:
        momentum: decay of the average of gradients.
        iterations: of the power iteration, per step.

    Raises:
        ConfigError: if the orthogonalization is unknown.
    """

    optim = "spectron"
    stacked = True
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

    def pair_terms(self, left: Stack, right: Stack) -> tuple[Tensor, Tensor]:
        first = (
            max(int(stack.state["step"].max()) for stack in (left, right)) == 1
        )  # one of them may already be counted
        of_left, of_right = (self._norms(stack, FIRST if first else self.iterations) for stack in (left, right))
        return of_left + of_right, of_left + of_right

    def _norms(self, stack: Stack, iterations: int) -> Tensor:
        factors = stack.joined([local(p) for p in stack.members]).float()
        return spectral_norm(factors, stack.rows, stack.state["vector"], iterations)

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        settings = (stack.rows, self.momentum, self.term_for(stack), self.coefficients)
        return spectron_direction(gradient, state["momentum"], *settings)
