"""What the optimizers share that work in a few columns of the cosine basis, chosen anew as the gradient changes."""

from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from lrtrain.config.ranges import RankOrShare
from lrtrain.model.rank import matrix_rank
from lrtrain.optim.base import Common, ShardedOptimizer
from lrtrain.optim.groups import MATRICES

Norm = Literal["l1", "l2"]


class DctSettings(Common):
    """The settings that both have."""

    rank: RankOrShare
    """How many columns: as an integer, or as a share of each matrix's min(out, in)."""
    norm: Norm
    """By which norm of S = G D columns are chosen: l2 drops the least energy."""


class DctOptimizer(ShardedOptimizer):
    """Chooses the r columns of D (n, n) along which a matrix (m, n) is largest.

    Always on the right, whatever the shape: S = G D is then of the rows here, and only sums over rows, (2, n), are
    exchanged.

    Raises:
        ConfigError: for a rank above min(m, n) of a matrix.
    """

    roles = MATRICES

    def __init__(self, model: nn.Module, *, rank: RankOrShare, norm: Norm, **common: Unpack[Common]):
        self.rank = rank
        self.norm = norm
        self._captured: dict[str, tuple[Tensor, Tensor]] = {}
        """‖·‖²_F of what the columns kept and of the whole, by the parameter's name."""
        super().__init__(model, **common)

    def rank_for(self, p: Tensor) -> int:
        return matrix_rank(self.rank, "optim.rank", self.names[p], *p.shape)

    def choose(self, p: Tensor, spectrum: Tensor) -> Tensor:
        """The columns (r,) of a matrix whose transform has `spectrum` (rows, n) here, ascending.

        Ties go to the lower index, so that all processes choose alike.
        """
        sums = self.rows[p].sum(torch.stack([spectrum.abs().sum(0), spectrum.square().sum(0)]))  # (2, n)
        columns = top_columns(sums[0 if self.norm == "l1" else 1], self.rank_for(p))
        if p not in self.place_in_batch:  # which lies on one process, and metrics are the same on all
            self._captured[self.names[p]] = sums[1, columns].sum(), sums[1].sum()
        return columns

    def captured_energy(self) -> dict[str, float]:
        """The share of ‖·‖²_F that the columns kept when they were last chosen, by the parameter's name; of zeros none.

        On matrices without structure along rows it is little more than r/n: then the method is not for this model.
        """
        return {name: float(kept / whole) for name, (kept, whole) in self._captured.items() if whole}

    def metrics(self) -> dict[str, float]:
        shares = self.captured_energy().values()
        return {"captured_energy": sum(shares) / len(shares)} if shares else {}


def top_columns(scores: Tensor, rank: int) -> Tensor:
    """The indices (r,) of the largest of the scores (n,), ascending; among equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:rank].sort().values
