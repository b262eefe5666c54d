"""Batches of matrices: parameters (experts, m, n), such as the experts of a layer.

They are sharded by expert, so each matrix lies whole on one process. An optimizer steps each matrix like a separate
parameter, and keeps the state of all of them as one tensor per key, sharded alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrtrain.distributed.sharding import local
from lrtrain.optim.rows import Rows, rows_like

State = dict[str, Tensor]


class Batch:
    """The matrices of one parameter on this process.

    Args:
        name: the parameter's name.
        parameter: (experts, m, n).
        transposed: whether its matrices are stored as (in, out), and are stepped as their transposes.
    """

    def __init__(self, name: str, parameter: Tensor, transposed: bool):
        self.parameter = parameter
        self.transposed = transposed
        self.first = Rows(parameter).first
        """The index of the first expert on this process."""
        part = local(parameter)
        self.matrices = [self._oriented(matrix).detach() for matrix in part]
        self.example = self._oriented(part.new_empty(1, 1).expand(part.shape[1:]))
        """A matrix of their shape with meaningless entries, since this process may hold none."""
        self.names = [f"{name}[{self.first + i}]" for i in range(len(self.matrices))]

    def refresh(self) -> None:
        """Make the matrices views of the parameter again, because FSDP2 moves its shards once."""
        for matrix, part in zip(self.matrices, local(self.parameter), strict=True):
            matrix.data = self._oriented(part.detach())

    def gradient(self, i: int) -> Tensor:
        """The gradient of the i-th matrix on this process."""
        assert self.parameter.grad is not None
        return self._oriented(local(self.parameter.grad)[i]).contiguous()

    def new_state(self, state_of_one: Callable[[Tensor], State]) -> State:
        """The initial state of all matrices, by key, (experts, …), from `state_of_one` for each."""
        example = {"step": torch.zeros(()), **state_of_one(self.example)}
        state = {key: rows_like(self.parameter, *value.shape, dtype=value.dtype) for key, value in example.items()}
        for i, matrix in enumerate(self.matrices):
            for key, value in state_of_one(matrix).items():
                local(state[key])[i] = value
        return state

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix
