"""A model split by tensor parallelism as one process computes it, without the others."""

from torch import Tensor

from lrtrain.distributed.tokens import TokenGroup
from lrtrain.engine.tensor import cut_parameters, split_computation
from lrtrain.model.loss import TokenLoss


class Alone(TokenGroup):
    """A group of which only the first process is there: shapes are right, values are not."""

    def __init__(self, size: int):
        self.size, self.index = size, 0

    def gather_rows(self, rows: Tensor) -> Tensor:
        return rows.repeat(self.size, *(1 for _ in rows.shape[1:]))

    def sum_parts(self, parts: Tensor) -> Tensor:
        return parts.chunk(self.size)[0].clone()


def split_alone(loss: TokenLoss, degree: int) -> None:
    """Split a model on meta over `degree` processes, of which only the first is there."""
    cut_parameters(loss.model, degree, lambda part, dim: part)
    split_computation(loss, Alone(degree))
