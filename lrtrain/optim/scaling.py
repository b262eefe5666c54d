"""How much Adam scales a projected gradient, as a factor for the whole one, and a limit on how fast such steps grow."""

import torch
from torch import Tensor

from lrtrain.optim.projections import Total

TINY = 1e-8  # in the published codes


def row_factors(adam: Tensor, projected: Tensor) -> Tensor:
    """‖u_i‖ / ‖g_i‖ for each row of Adam's step u (rows, r) on the projected gradient g (rows, r): (rows, 1)."""
    norms = (torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (adam, projected))
    return next(norms) / (next(norms) + TINY)


def matrix_factor(adam: Tensor, projected: Tensor, total: Total) -> Tensor:
    """‖u‖ / ‖g‖ over the rows of all processes, a scalar."""
    squares = torch.stack([torch.linalg.vector_norm(part).square() for part in (adam, projected)])
    above, below = total(squares).sqrt()
    return above / (below + TINY)


def limit_growth(update: Tensor, norm: Tensor, most: float, correction: float, total: Total) -> Tensor:
    """Scale an update down, in place, so that its norm is at most `most` times the one before.

    The norm-growth limiter of Fira (arXiv 2410.01623), which is also APOLLO's. Norms are of all processes' rows and, as
    published, of the update before Adam's bias correction. After a norm of zero there is no limit.

    Args:
        norm: the norm before, a scalar; becomes this one.
        correction: the bias correction that is already in the update.
        total: sums over the processes.
    """
    new = total(torch.linalg.vector_norm(update).square()).sqrt() / correction
    factor = torch.where(norm > 0, most * norm / new, 1.0).clamp(max=1.0)
    norm.copy_(new * factor)
    return update.mul_(factor)
