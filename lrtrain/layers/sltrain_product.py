"""The product of SLTrain's layer, y = x (s·B A + S)ᵀ, with a backward pass for each execution."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrtrain.layers import block_products, sparse_support
from lrtrain.layers.sparse_support import flat_positions, sparse_apply, sparse_gradients


def compose(
    left: Tensor, right: Tensor, values: Tensor, crow: Tensor | None, col: Tensor, block: int, scale: float
) -> Tensor:
    """W = scale·B A + S: B (out, r), A (r, in), values (nnz,) on the support → (out, in)."""
    weight = (scale * left) @ right
    add_sparse_(weight, values, crow, col, block)
    return weight


def add_sparse_(weight: Tensor, values: Tensor, crow: Tensor | None, col: Tensor, block: int) -> None:
    """Add S to weight (out, in), in place."""
    weight.view(-1).index_add_(0, flat_positions(crow, col, block, weight.shape[1]), values)


class _Materialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, left, right, values, crow, col, block, scale):
        ctx.save_for_backward(x, left, right, values, crow, col)
        ctx.block, ctx.scale = block, scale
        return x @ compose(left, right, values, crow, col, block, scale).T

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, left, right, values, crow, col = ctx.saved_tensors
        dx = g @ compose(left, right, values, crow, col, ctx.block, ctx.scale) if ctx.needs_input_grad[0] else None
        dense = g.T @ x  # (out, in), temporary
        d_left = ctx.scale * (dense @ right.T)
        d_right = ctx.scale * (left.T @ dense)
        d_values = dense.view(-1)[flat_positions(crow, col, ctx.block, right.shape[1])]
        return dx, d_left, d_right, d_values, None, None, None, None


class _Factored(torch.autograd.Function):
    """With single entries."""

    @staticmethod
    def forward(ctx, x, left, right, values, crow, col, block, scale):
        z = x @ right.T  # (tokens, r)
        ctx.save_for_backward(x, z, left, right, values, crow, col)
        ctx.scale = scale
        return sparse_apply(values, crow, col, x).addmm_(z, left.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, z, left, right, values, crow, col = ctx.saved_tensors
        dx, d_values = sparse_gradients(values, crow, col, g, x)
        dz = ctx.scale * (g @ left)  # (tokens, r)
        return dx.addmm_(dz, right), ctx.scale * (g.T @ z), dz.T @ x, d_values, None, None, None, None


class _FactoredBlocks(torch.autograd.Function):
    """With blocks, whose products are those of `sparse_support`, or with `kernels` those of `block_products`."""

    @staticmethod
    def forward(ctx, x, left, right, values, col, block, scale, kernels):
        z = x @ right.T  # (tokens, r)
        ctx.save_for_backward(x, z, left, right, values, col)
        ctx.block, ctx.scale, ctx.kernels = block, scale, kernels
        y = z @ (scale * left).T  # scaling the weights reads less than scaling z
        products = block_products if kernels else sparse_support
        products.block_add_(y, values, col, block, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, z, left, right, values, col = ctx.saved_tensors
        products = block_products if ctx.kernels else sparse_support
        dz = g @ (ctx.scale * left)  # (tokens, r)
        dx = dz @ right
        products.block_add_transposed_(dx, values, col, ctx.block, g)
        d_values = products.block_sampled(g, x, col, ctx.block)
        return dx, ctx.scale * (g.T @ z), dz.T @ x, d_values, None, None, None, None


def sltrain_linear(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    values: Tensor,
    crow: Tensor | None,
    col: Tensor,
    block: int,
    scale: float,
    execution: str | None,
) -> Tensor:
    """x (..., in) → x Wᵀ (..., out) for W = scale·B A + S, with the backward pass of the chosen execution.

    Args:
        values, crow, col, block: S; see `lrtrain.layers.sparse_support`.
        execution: `factored`, `triton`, or any other to materialize W.
    """
    tokens = x.reshape(-1, x.shape[-1])
    factored = execution in ("factored", "triton")
    if factored and block > 1:
        y = _FactoredBlocks.apply(tokens, left, right, values, col, block, scale, execution == "triton")
    else:
        function = _Factored if factored else _Materialized
        y = function.apply(tokens, left, right, values, crow, col, block, scale)
    return y.view(*x.shape[:-1], -1)
