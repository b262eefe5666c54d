"""Dealing matrices with sharded rows out to the processes: each gets some of them whole."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lrtrain.optim.rows import Rows


class Deal:
    """`out` gives each process of p its ⌈k/p⌉ of k matrices whole, `back` gives each its rows of all of them again.

    Each is one all-to-all, in which a process receives as many bytes as its rows of all matrices have.

    Args:
        rows: those of each matrix.
        x: this process's rows ([k,] rows, n).
    """

    def __init__(self, rows: Rows, x: Tensor):
        self.rows = rows
        self.shape = x.shape
        self.count = x.shape[0] if x.ndim == 3 else 1
        self.each = -(-self.count // rows.processes)

    def out(self, x: Tensor) -> Tensor:
        """This process's rows ([k,] rows, n) → its matrices (⌈k/p⌉, m, n), zeros in place of missing ones."""
        x = x.view(self.count, *self.shape[-2:])
        if self.rows.group is None:
            return x
        size = self.rows.processes
        x = padded(x, self.rows.most - x.shape[1], size * self.each - self.count)
        parts = self._exchange(x.view(size, self.each, *x.shape[1:]))  # from each process, its rows of mine
        return parts.transpose(0, 1).flatten(1, 2)[:, : self.rows.shape[0]]

    def back(self, whole: Tensor) -> Tensor:
        """This process's matrices (⌈k/p⌉, m, n) → its rows ([k,] rows, n) of all."""
        if self.rows.group is None:
            return whole.reshape(self.shape)
        size, most = self.rows.processes, self.rows.most
        whole = padded(whole, size * most - whole.shape[1], 0)
        parts = self._exchange(whole.unflatten(1, (size, most)).transpose(0, 1))  # from each process, my rows of its
        return parts.flatten(0, 1)[: self.count, : self.shape[-2]].reshape(self.shape)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Give parts[i] to process i: (processes, …)."""
        found = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(found, parts.contiguous(), group=self.rows.group)
        return found


def padded(x: Tensor, rows: int, matrices: int) -> Tensor:
    """The matrices (k, m, n) with zeros in so many more rows and matrices."""
    return F.pad(x, (0, 0, 0, rows, 0, matrices)) if rows or matrices else x
