"""Adam on projected gradients: the base class of GaLore, Fira and APOLLO."""

from abc import abstractmethod
from typing import NamedTuple, Unpack

from pydantic import PositiveInt
from torch import Tensor, nn

from lrtrain.config.ranges import RankOrShare
from lrtrain.errors import ConfigError
from lrtrain.model.rank import matrix_rank
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.common import Common
from lrtrain.optim.groups import MATRICES
from lrtrain.optim.rows import rows_like
from lrtrain.optim.stacks import Stack


class Subspace(Common):
    """The settings of all methods on projected gradients."""

    rank: RankOrShare
    """Columns of the basis: an integer, or a share of each matrix's min(out, in)."""
    gap: PositiveInt
    """Steps between bases."""


class Projected(NamedTuple):
    """A gradient G in a subspace, or those of the members of a stack."""

    basis: Tensor
    """P (n, r)."""
    gradient: Tensor
    """G P (rows, r)."""
    adam: Tensor
    """Adam's step (rows, r) on it."""


class SubspaceAdam(ShardedOptimizer):
    """Adam on G P (m, r) for each matrix's gradient G (m, n) and a basis P (n, r) that changes every `gap` steps.

    The moments (m, r) are sharded like the parameter's rows, and are not changed when the basis changes, as published.
    The projection always multiplies from the right (the published codes project the longer side): it needs no
    communication, and no process holds moments of other rows.

    Raises:
        ConfigError: if the rank is not below min(m, n) of each matrix.
    """

    roles = MATRICES
    stacked = True

    def __init__(self, model: nn.Module, *, rank: RankOrShare, gap: PositiveInt, **common: Unpack[Common]):
        self.rank = rank
        self.gap = gap
        super().__init__(model, **common)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        rank = matrix_rank(self.rank, "optim.rank", self.names[p], *p.shape)
        if self.rank >= 1 and rank == min(p.shape):  # a share below 1 always works
            raise ConfigError(
                f"optim.rank={self.rank} is not below min(in, out)={rank} of {self.names[p]}; use a lower one, or a "
                "share such as 0.25"
            )
        return {"first": rows_like(p, rank), "second": rows_like(p, rank)}

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        basis = self.basis(stack, gradient, state, step)
        projected = gradient @ basis  # (rows, n) @ (n, r) → (rows, r)
        adam = self.adam_step(projected, state["first"], state["second"], step)
        return self.lifted(stack, gradient, Projected(basis, projected, adam), state, step)

    @abstractmethod
    def basis(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The bases ([members,] n, r) of this step, or one for all members (n, r)."""

    @abstractmethod
    def lifted(self, stack: Stack, gradient: Tensor, found: Projected, state: dict[str, Tensor], step: int) -> Tensor:
        """The steps ([members,] rows, n) on the matrices; may overwrite the gradient."""
