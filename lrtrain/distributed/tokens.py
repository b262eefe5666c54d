"""Tokens cut over a group of processes, and the collectives that change who has which."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor


class TokenGroup:
    """Processes that share sequences: each has as many rows of its own, and one part of the tokens of all rows.

    All methods are collectives of the group, and those on floats are differentiable.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        """This process's index in the group."""

    def cut(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's part of a dimension; no communication."""
        return x.chunk(self.size, dim)[self.index]

    def gather(self, x: Tensor) -> Tensor:
        """(rows, part of the tokens, k) → (rows, tokens, k). Gradients are summed over the group."""
        return cast(Tensor, _Exchange.apply(x, self, _gathered, _summed))

    def sum(self, x: Tensor) -> Tensor:
        """(rows, tokens, k), summed over the group → (rows, part of the tokens, k)."""
        return cast(Tensor, _Exchange.apply(x, self, _summed, _gathered))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(own rows, tokens) → (rows of all, tokens)."""
        found = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_single(found, rows.contiguous(), group=self.group)
        return found

    def sum_parts(self, parts: Tensor) -> Tensor:
        """(rows of all, tokens), summed over the group → (rows of this process, tokens)."""
        found = parts.new_empty(len(parts) // self.size, *parts.shape[1:])
        dist.reduce_scatter_single(found, parts.contiguous(), group=self.group)
        return found

    def most(self, count: int, device: torch.device) -> int:
        """The largest count of all."""
        found = torch.tensor(count, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def own_rows(self, x: Tensor) -> Tensor:
        """(rows of all, part of the tokens, k) → (own rows, tokens, k); not differentiable."""
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x.contiguous(), group=self.group)
        return _parts_side_by_side(received, self.size)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens, forward, backward):
        ctx.tokens, ctx.back = tokens, backward
        return forward(x, tokens)

    @staticmethod
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.back(grad_outputs[0], ctx.tokens), None, None, None


def _gathered(x: Tensor, tokens: TokenGroup) -> Tensor:
    return _parts_side_by_side(tokens.gather_rows(x), tokens.size)


def _summed(x: Tensor, tokens: TokenGroup) -> Tensor:
    return tokens.sum_parts(x.unflatten(1, (tokens.size, -1)).transpose(0, 1).flatten(0, 1))


def _parts_side_by_side(x: Tensor, parts: int) -> Tensor:
    """(parts × rows, tokens of a part, k) → (rows, tokens, k)."""
    return x.unflatten(0, (parts, -1)).transpose(0, 1).flatten(1, 2)
