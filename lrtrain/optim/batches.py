"""Batches of matrices: parameters (experts, m, n), as the experts of a layer are kept.

They are sharded by experts, so each matrix lies whole on one process. An optimizer steps each as it would a parameter
of its own, and keeps what it needs for all of them as one tensor per key, sharded alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lrtrain.distributed.sharding import local
from lrtrain.optim.rows import Rows, rows_like

State = dict[str, Tensor]


class Batch:
    """The matrices of one parameter that lie here.

    Args:
        name: the parameter's.
        parameter: (experts, m, n).
        transposed: whether its matrices map m to n, and are stepped as their transposes (n, m).
    """

    def __init__(self, name: str, parameter: Tensor, transposed: bool):
        self.parameter = parameter
        self.transposed = transposed
        self.first = Rows(parameter).first
        """Which expert's matrix is the first one here."""
        part = local(parameter)
        self.matrices = [self._oriented(matrix).detach() for matrix in part]
        self.example = self._oriented(part.new_empty(1, 1).expand(part.shape[1:]))
        """A matrix of their shape, whose entries are of no use: there may be none here."""
        self.names = [f"{name}[{self.first + i}]" for i in range(len(self.matrices))]

    def refresh(self) -> None:
        """Let the matrices be those of the parameter again: FSDP2 moves its shards once."""
        for matrix, part in zip(self.matrices, local(self.parameter), strict=True):
            matrix.data = self._oriented(part.detach())

    def gradient(self, i: int) -> Tensor:
        """Of the i-th matrix here."""
        assert self.parameter.grad is not None
        return self._oriented(local(self.parameter.grad)[i]).contiguous()

    def new_state(self, state_of_one: Callable[[Tensor], State]) -> State:
        """The states of all matrices, that of each as `state_of_one` begins it, by key: (experts, …)."""
        example = {"step": torch.zeros(()), **state_of_one(self.example)}
        state = {key: rows_like(self.parameter, *value.shape, dtype=value.dtype) for key, value in example.items()}
        for i, matrix in enumerate(self.matrices):
            for key, value in state_of_one(matrix).items():
                local(state[key])[i] = value
        return state

    def _oriented(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix
