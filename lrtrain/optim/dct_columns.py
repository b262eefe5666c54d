"""The base class of optimizers that work in a few columns of the cosine basis, chosen by the gradient."""

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from lrtrain.config.ranges import RankOrShare
from lrtrain.model.rank import matrix_rank
from lrtrain.optim.base import Common, ShardedOptimizer
from lrtrain.optim.groups import MATRICES

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

    def __init__(self, model: nn.Module, *, rank: RankOrShare, norm: Norm, **common: Unpack[Common]):
        self.rank = rank
        self.norm = norm
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        """‖·‖²_F of the chosen columns and of the whole matrix, by parameter name."""
        super().__init__(model, **common)

    def rank_for(self, p: Tensor) -> int:
        return matrix_rank(self.rank, "optim.rank", self.names[p], *p.shape)

    def choose(self, p: Tensor, spectrum: Tensor) -> Tensor:
        """The chosen columns (r,), ascending, for a matrix with the transform `spectrum` (rows, n) on this process.

        Ties go to the lower index, so that all processes choose the same columns.
        """
        sums = self.rows[p].sum(torch.stack([spectrum.abs().sum(0), spectrum.square().sum(0)]))  # (2, n)
        columns = top_columns(sums[0 if self.norm == "l1" else 1], self.rank_for(p))
        if p not in self.place_in_batch:  # one process holds a batch's matrix, but metrics must be equal on all
            self._captured[self.names[p]] = sums[1, columns].sum(), sums[1].sum()
        return columns

    def captured_energy(self) -> dict[str, float]:
        """The share of ‖·‖²_F in the columns when they were last chosen, by parameter name, without zero matrices.

        For matrices without structure along rows it is little more than r/n: the method then does not suit the model.
        """
        return {name: float(kept / whole) for name, (kept, whole) in self._captured.items() if whole}

    def metrics(self) -> dict[str, float]:
        shares = self.captured_energy().values()
        return {"captured_energy": sum(shares) / len(shares)} if shares else {}


def top_columns(scores: Tensor, rank: int) -> Tensor:
    """The indices (r,) of the largest scores (n,), ascending; ties go to the lower index."""
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values
