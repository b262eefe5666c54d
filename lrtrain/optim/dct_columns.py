"""The base class of optimizers that work in a few columns of the cosine basis, chosen by the gradient."""

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from lrtrain.config.ranges import RankOrShare
from lrtrain.model.rank import matrix_rank
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.common import Common
from lrtrain.optim.groups import MATRICES
from lrtrain.optim.stacks import Stack

Norm = Literal["l1", "l2"]


class DctSettings(Common):
    """The settings of these optimizers."""

    rank: RankOrShare
    """Number of columns: an integer, or a share of each matrix's min(out, in)."""
    norm: Norm
    """The norm of the columns of S = G D by which they are chosen: l2 drops the least energy."""


class DctOptimizer(ShardedOptimizer):
    """Chooses the r columns of the cosine basis D (n, n) along which a matrix (m, n) is largest.

    D always multiplies from the right, so that S = G D is computed row by row, and only sums over rows, (2, n), are
    all-reduced.

    Raises:
        ConfigError: if the rank is above min(m, n) of a matrix.
    """

    roles = MATRICES
    stacked = True

    def __init__(self, model: nn.Module, *, rank: RankOrShare, norm: Norm, **common: Unpack[Common]):
        self.rank = rank
        self.norm = norm
        self._captured: dict[str, Tensor] = {}
        """‖·‖²_F of the chosen columns and of the whole matrix (2,), by parameter name."""
        super().__init__(model, **common)

    def rank_for(self, p: Tensor) -> int:
        return matrix_rank(self.rank, "optim.rank", self.names[p], *p.shape)

    def choose(self, stack: Stack, spectrum: Tensor) -> Tensor:
        """The chosen columns ([members,] r), ascending, for matrices with the transforms `spectrum` ([members,]
        rows, n) on this process.

        Ties go to the lower index, so that all processes choose the same columns.
        """
        sizes, energies = stack.rows.sum(torch.stack([spectrum.abs().sum(-2), spectrum.square().sum(-2)]))
        columns = top_columns(sizes if self.norm == "l1" else energies, self.rank_for(stack.first))
        shares = torch.stack([energies.gather(-1, columns).sum(-1), energies.sum(-1)], -1)  # ([members,] 2)
        for p, share in zip(stack.members, stack.each(shares), strict=True):
            if p not in self.place_in_batch:  # one process holds a batch's matrix, but metrics must be equal on all
                self._captured[self.names[p]] = share
        return columns

    def captured_energy(self) -> dict[str, float]:
        """The share of ‖·‖²_F in the columns when they were last chosen, by parameter name, without zero matrices.

        For matrices without structure along rows it is little more than r/n: the method then does not suit the model.
        """
        found = torch.stack([*self._captured.values()]).tolist() if self._captured else []
        return {name: kept / whole for name, (kept, whole) in zip(self._captured, found, strict=True) if whole}

    def metrics(self) -> dict[str, float]:
        shares = self.captured_energy().values()
        return {"captured_energy": sum(shares) / len(shares)} if shares else {}


def top_columns(scores: Tensor, rank: int) -> Tensor:
    """The indices (…, r) of the largest scores (…, n), ascending; ties go to the lower index."""
    return scores.sort(descending=True, stable=True).indices[..., :rank].sort().values
