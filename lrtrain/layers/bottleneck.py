"""Shared by layers with an r-dimensional bottleneck: activations between the factors, and DLR's foldable residual."""

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["silu", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "none": lambda z: z}


def check_mergeable(activation: str) -> None:
    """Raises NotImplementedError if an activation between the factors prevents merging into one matrix."""
    if activation != "none":
        raise NotImplementedError(
            f"a layer with param.activation={activation} is not one matrix; only param.activation=none can be merged"
        )


def with_residual(left: Tensor, alpha: float, first: int = 0, out_features: int | None = None) -> Tensor:
    """B (out, r) plus α/√K at [o, ⌊o/K⌋], K = ⌈out/r⌉, which turns B z into B z + (α/√K)·Expand_K(z).

    Expand_K repeats each of the r latents K times and truncates to `out` (DLR, Wang et al., arXiv 2606.28932). DLR adds
    it to the outputs, at a cost of tokens·out; adding it to B costs out·r.

    Args:
        first: the first of these rows among those of all `out_features` (None: these are all).
    """
    rows, rank = left.shape
    repeats = math.ceil((out_features or rows) / rank)
    here = torch.arange(rows, device=left.device)
    added = torch.full_like(left[:, 0], alpha / math.sqrt(repeats))
    return left.index_put((here, (first + here) // repeats), added, accumulate=True)


def linear_with_residual(
    z: Tensor, left: Tensor, bias: Tensor | None, alpha: float, first: int = 0, out_features: int | None = None
) -> Tensor:
    """z (…, r) → (…, out) with the weight `with_residual(left, alpha, …)`, which the backward pass recomputes: only z
    and the parameters are saved for it."""
    return cast(Tensor, _LinearWithResidual.apply(z, left, bias, (alpha, first, out_features)))


class _LinearWithResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, left, bias, residual):
        ctx.save_for_backward(z, left)
        ctx.residual = residual
        return F.linear(z, with_residual(left, *residual), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = grad_outputs
        z, left = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dy_rows = dy.flatten(0, -2)
        dz = dy @ with_residual(left, *ctx.residual) if wanted[0] else None
        d_left = dy_rows.T @ z.flatten(0, -2) if wanted[1] else None
        return dz, d_left, dy_rows.sum(0) if wanted[2] else None, None
