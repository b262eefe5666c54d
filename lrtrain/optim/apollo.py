"""APOLLO and APOLLO-Mini: learning rates by channel, from Adam on random projections (Zhu et al., arXiv 2412.05270)."""

import math
from typing import Literal, Unpack

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from lrtrain.core.seeds import integer_seed
from lrtrain.distributed.sharding import local
from lrtrain.optim.adam import bias_correction
from lrtrain.optim.projections import gaussian_basis, sparse_basis
from lrtrain.optim.scaling import limit_growth, matrix_factor, row_factors
from lrtrain.optim.stacks import Stack
from lrtrain.optim.subspace import Projected, Subspace, SubspaceAdam

BASES = {"gaussian": gaussian_basis, "sparse": sparse_basis}


class Apollo(SubspaceAdam):
    """APOLLO: W ← W − lr·√scale·limited(G scaled as Adam scales its random projection G P).

    The basis is a function of (seed, n, r, step // gap): matrices of one shape share it, and it changes every `gap`
    steps. A channel is always a row: its factor needs no communication; the limiter all-reduces one scalar. State: 2mr
    numbers and a norm.

    Args:
        factors: `channel`: one factor per row; `tensor`: one per matrix (APOLLO-Mini, with rank 1).
        scale: the step is multiplied by √scale. A row factor in r dimensions is √(r/n) times that of Adam on G.
        basis: `gaussian` or `sparse`; see `sparse_basis`.
        max_growth: limit on the growth of the step's norm from one step to the next; None: no limit.
    """

    replicated = frozenset({"norm"})

    def __init__(
        self,
        model: nn.Module,
        *,
        factors: Literal["channel", "tensor"],
        scale: PositiveFloat,
        basis: Literal["gaussian", "sparse"],
        max_growth: PositiveFloat | None,
        **subspace: Unpack[Subspace],
    ):
        self.by_row = factors == "channel"
        self.multiplier = math.sqrt(scale)
        self.draw = BASES[basis]
        self.max_growth = max_growth
        self.bases: dict[tuple[int, int], Tensor] = {}
        self.drawn: dict[tuple[int, int], int] = {}
        """The index (step // gap) of the basis that `bases` holds for a shape."""
        super().__init__(model, **subspace)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        moments = super().new_state(p)
        shape, device = (p.shape[1], moments["first"].shape[1]), local(p).device
        if shape not in self.bases:
            self.bases[shape] = torch.empty(shape, device=device)
        return moments | {"norm": torch.zeros((), device=device)}

    def shared(self) -> list[Tensor]:
        return [*self.bases.values()]

    def basis(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        n, rank = shape = (stack.shape[1], state["first"].shape[-1])
        which = (step - 1) // self.gap
        if self.drawn.get(shape) != which:
            self.bases[shape].copy_(self.draw(n, rank, integer_seed(self.seed, f"basis {which} of {n}×{rank}")))
            self.drawn[shape] = which
        return self.bases[shape]

    def lifted(self, stack: Stack, gradient: Tensor, found: Projected, state: dict[str, Tensor], step: int) -> Tensor:
        total = stack.rows.sum
        if self.by_row:
            factors = row_factors(found.adam, found.gradient)
        else:
            factors = matrix_factor(found.adam, found.gradient, total)[..., None, None]
        update = gradient.mul_(factors * self.multiplier)
        if self.max_growth is None:
            return update
        correction = bias_correction(step, self.beta1, self.beta2)
        return limit_growth(update, state["norm"], self.max_growth, correction, total)
