"""Trion: orthogonalized momentum in a few columns of the cosine basis (Modoranu et al., arXiv 2505.17967)."""

from typing import Unpack

from torch import Tensor, nn

from lrtrain.config.ranges import ShareBelowOne
from lrtrain.linalg.dct import dct, lift, selected
from lrtrain.optim.dct_columns import DctOptimizer, DctSettings
from lrtrain.optim.orthogonal import ADJUSTMENTS, ITERATIONS, Adjustment, Orthogonalization, orthogonalize
from lrtrain.optim.rows import rows_like
from lrtrain.optim.stacks import Stack


class Trion(DctOptimizer):
    """Trion: with M ← M + G and b = M Dᵢ (m, r), where Dᵢ (n, r) are the columns of the cosine basis along which M is
    largest: M ← M − (1 − μ) b Dᵢᵀ, W ← W − lr·s·orthogonalized(b) Dᵢᵀ.

    What the columns leave out stays in M for later steps. Columns are chosen in each step, so the state is M only: mn
    numbers. With all columns Trion is Muon without nesterov. The scale s is Muon's for every rank, so each direction
    in the columns moves as far as with Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        momentum: ShareBelowOne,
        adjust: Adjustment,
        orthogonalization: Orthogonalization,
        **dct: Unpack[DctSettings],
    ):
        self.scale = ADJUSTMENTS[adjust]
        self.coefficients = ITERATIONS[orthogonalization]
        self.momentum = momentum
        super().__init__(model, **dct)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        self.rank_for(p)  # raises ConfigError if the rank does not fit
        return {"momentum": rows_like(p, p.shape[1])}

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        n = gradient.shape[-1]
        momentum = state["momentum"].add_(gradient)
        spectrum = dct(momentum)
        columns = self.choose(stack, spectrum)
        part = selected(spectrum, columns)  # ([members,] rows, r)
        momentum.sub_(lift(part, columns, n), alpha=1 - self.momentum)
        update = orthogonalize(part, stack.rows, self.coefficients).mul_(self.scale(*self.shape(stack.first)))
        return lift(update, columns, n)
