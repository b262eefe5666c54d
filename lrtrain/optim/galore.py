"""GaLore: Adam in the subspace of a gradient's leading singular vectors (Zhao et al., arXiv 2403.03507)."""

from typing import Literal, Unpack

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from lrtrain.core.seeds import generator_for
from lrtrain.distributed.sharding import local
from lrtrain.optim.projections import randomized_basis, svd_basis
from lrtrain.optim.stacks import Stack
from lrtrain.optim.subspace import Projected, Subspace, SubspaceAdam

Basis = Literal["randomized", "svd"]


class GaLoreSettings(Subspace):
    """The settings of GaLore and Fira."""

    scale: PositiveFloat
    basis: Basis


class GaLore(SubspaceAdam):
    """GaLore: W ← W − lr·scale·u Pᵀ, where u (m, r) is Adam's step on G P; the rest of the gradient is dropped.

    P (n, r) are the leading right singular vectors of the current gradient, computed at the first nonzero gradient and
    then every `gap` steps, staggered over the matrices so that no step computes all of them. State: 2mr + nr numbers.
    """

    replicated = frozenset({"basis"})
    begins_by_gradient = True

    def __init__(self, model: nn.Module, *, scale: PositiveFloat, basis: Basis, **subspace: Unpack[Subspace]):
        self.scale = scale
        self.found_by = basis
        super().__init__(model, **subspace)
        self.turn = {p: place % self.gap for place, p in enumerate(self.parameters)}
        for matrix, (p, i) in self.place_in_batch.items():
            self.turn[matrix] = (self.turn[p] + self.batches[p].first + i) % self.gap

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        moments = super().new_state(p)
        return moments | {"basis": torch.zeros(p.shape[1], moments["first"].shape[1], device=local(p).device)}

    def basis(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        for p, own, basis in zip(stack.members, stack.each(gradient), stack.each(state["basis"]), strict=True):
            if step == 1 or (step - 1) % self.gap == self.turn[p]:
                basis.copy_(self.compute_basis(p, own, basis.shape[1], step))
        return state["basis"]

    def compute_basis(self, p: Tensor, gradient: Tensor, rank: int, step: int) -> Tensor:
        """The leading right singular vectors (n, r) of a gradient."""
        total = self.rows[p].sum
        if self.found_by == "svd":
            return svd_basis(gradient, rank, total)
        return randomized_basis(gradient, rank, generator_for(self.seed, f"basis of {self.names[p]} at {step}"), total)

    def lifted(self, stack: Stack, gradient: Tensor, found: Projected, state: dict[str, Tensor], step: int) -> Tensor:
        return torch.matmul(found.adam, found.basis.mT, out=gradient).mul_(self.scale)
