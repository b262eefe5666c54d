"""Scaling a gradient as Adam scales its projection, and limiting the growth of such steps."""

import torch
from torch import Tensor

from lrtrain.optim.projections import Total

TINY = 1e-8  # in the published codes


def row_factors(adam: Tensor, projected: Tensor) -> Tensor:
    """‖u_i‖ / ‖g_i‖ for each row of Adam's step u ([members,] rows, r) on the projected gradient g: ([members,] rows,
    1)."""
    norms = (torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in (adam, projected))
    return next(norms) / (next(norms) + TINY)


def matrix_factor(adam: Tensor, projected: Tensor, total: Total) -> Tensor:
    """‖u‖ / ‖g‖ over the rows of all processes, of each matrix ([members])."""
    above, below = total(torch.stack([_norm(part).square() for part in (adam, projected)])).sqrt()
    return above / (below + TINY)


def limit_growth(update: Tensor, norm: Tensor, most: float, correction: float, total: Total) -> Tensor:
    """Scale updates down, in place, so that the norm of each is at most `most` times its last one.

    The norm-growth limiter of Fira (arXiv 2410.01623) and APOLLO. Norms are over all processes' rows and, as published,
    of the update before Adam's bias correction. After a norm of zero there is no limit.

    Args:
        update: ([members,] rows, n).
        norm: the last norm ([members]); updated in place.
        correction: the bias correction already applied to the update.
        total: all-reduce.
    """
    new = total(_norm(update).square()).sqrt() / correction
    factor = torch.where(norm > 0, most * norm / new, 1.0).clamp(max=1.0)
    norm.copy_(new * factor)
    return update.mul_(factor[..., None, None])


def _norm(x: Tensor) -> Tensor:
    """The Frobenius norm of each matrix (…, rows, n)."""
    return torch.linalg.vector_norm(x.flatten(-2), dim=-1)
