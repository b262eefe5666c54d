"""Updates in the backward pass: each parameter is stepped as soon as its gradient is complete, which is then freed.

Only the gradients of one block exist at a time (Lv et al., "Full parameter fine-tuning ... with limited resources",
LOMO, arXiv 2306.09782). The norm over all parameters is not known in time, so each gradient is clipped separately.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lrtrain.distributed.sharding import local
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.rows import Rows


class InBackward:
    """Hooks on an optimizer's parameters that step them.

    Args:
        clip: returns the largest norm of one parameter's gradient, or None.
    """

    def __init__(self, optimizer: ShardedOptimizer, clip: Callable[[], float | None]):
        self.optimizer = optimizer
        self.clip = clip
        self.begin()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(lambda p, group=group: self._step(p, group))

    def begin(self) -> None:
        """Reset before the first backward pass of a step."""
        self.squares = 0.0
        self.skipped = False
        self.optimizer.begin_step()

    @torch.no_grad()
    def _step(self, p: Tensor, group: dict) -> None:
        norm = clip_one(p, self.optimizer.rows[p], self.clip())
        if math.isfinite(norm):
            self.optimizer.step_one(p, group)
        else:
            self.skipped = True
        self.squares += norm**2
        p.grad = None

    @property
    def norm(self) -> float:
        """L2 norm of all gradients of this step, before clipping."""
        return math.sqrt(self.squares) if math.isfinite(self.squares) else math.nan


@torch.no_grad()
def clip_one(p: Tensor, rows: Rows, most: float | None) -> float:
    """Clip a parameter's gradient to the norm `most` and return its norm before; a collective of its process group."""
    assert p.grad is not None
    gradient = local(p.grad)
    norm = math.sqrt(rows.sum(torch.linalg.vector_norm(gradient, dtype=torch.float32).square()).item())
    if most is not None and norm > most:
        gradient.mul_(most / norm)
    return norm
