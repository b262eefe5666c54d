"""Factor gradients preconditioned by the other factor: steps on B A that do not depend on its factorization."""

from typing import Unpack

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from lrtrain.distributed.sharding import local
from lrtrain.optim.common import Common
from lrtrain.optim.pairs import PartnerOptimizer
from lrtrain.optim.rows import rows_like
from lrtrain.optim.stacks import Stack


def cholesky_of_gram(gram: Tensor, damping: PositiveFloat) -> Tensor:
    """The lower triangular L (…, r, r) with LLᵀ = gram + δI, in gram's dtype."""
    return torch.linalg.cholesky(gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))


def precondition_left(gradient: Tensor, cholesky: Tensor) -> Tensor:
    """∂B (AAᵀ + δI)⁻¹ for some rows of ∂B (…, r), from the Cholesky factor of AAᵀ + δI."""
    return torch.cholesky_solve(gradient.mT, cholesky).mT


def precondition_right(gradient: Tensor, cholesky: Tensor) -> Tensor:
    """(BᵀB + δI)⁻¹ ∂A for the unsharded ∂A (…, r, n), from the Cholesky factor of BᵀB + δI."""
    return torch.cholesky_solve(gradient, cholesky)


class PreconditionedAdamW(PartnerOptimizer):
    """Adam, or plain gradient descent, on preconditioned gradients of factors B (m, r) and A (r, n).

        ∂B ← ∂B (AAᵀ + δI)⁻¹,  ∂A ← (BᵀB + δI)⁻¹ ∂A

    (Tong, Ma and Chi, "Accelerating Ill-Conditioned Low-Rank Matrix Estimation via Scaled Gradient Descent", JMLR 2021;
    Zhang and Pilanci, "Riemannian Preconditioned LoRA", arXiv 2402.02347.) With plain descent the change of B A is
    −η(G P_A + P_B G) to first order, with the projectors on A's rows and B's columns: the same for every factorization
    (B T, T⁻¹A), as long as δ is small relative to both Grams. Adam's elementwise division does depend on the
    factorization. Both steps use the other factor from before the step (the published code steps A first).

    State: Adam's moments, 8r(m + n) bytes; none for plain descent. Each process receives 4rn bytes of A, 4rn of ∂A
    and 8r² of Grams per pair and step, because A is sharded over its r rows, which (BᵀB + δI)⁻¹ mixes. The Grams are
    float64 (2r²(m + n) operations), because those of nearly rank-deficient factors would be indefinite in float32.

    Args:
        damping: δ, absolute, as published.
        adam: whether to apply Adam to the preconditioned gradients.
    """

    optim = "preconditioned_adamw"
    stacked = True

    def __init__(self, model: nn.Module, damping: PositiveFloat, adam: bool, **common: Unpack[Common]):
        self.damping = damping
        self.adam = adam
        super().__init__(model, **common)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return {key: rows_like(p, p.shape[1]) for key in ("exp_avg", "exp_avg_sq")} if self.adam else {}

    def pair_terms(self, left: Stack, right: Stack) -> tuple[Tensor, Tensor]:
        b, a = (stack.joined([local(p) for p in stack.members]) for stack in (left, right))
        b, a = b.double(), right.rows.gather(a).double()  # ([members,] m here, r) and ([members,] r, n)
        left_gram = left.rows.sum(b.mT @ b)
        return cholesky_of_gram(a @ a.mT, self.damping), cholesky_of_gram(left_gram, self.damping)

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        cholesky = self.term_for(stack).to(gradient.dtype)
        if stack.first is self.pair_of[stack.first].left:
            gradient = precondition_left(gradient, cholesky)
        else:
            rows = stack.rows
            gradient = rows.cut(precondition_right(rows.gather(gradient), cholesky))
        if not self.adam:
            return gradient
        return self.adamw_direction(stack, gradient, state, step)
