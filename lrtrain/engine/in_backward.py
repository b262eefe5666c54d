"""Updates in the backward pass: each parameter is stepped as soon as its gradient is complete, which is then freed.

Only the gradients of one block exist at a time (Lv et al., "Full parameter fine-tuning ... with limited resources",
LOMO, arXiv 2306.09782). The norm over all parameters is not known in time, so each gradient is clipped separately.
"""

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
        self.norms: list[Tensor] = []
        self.counts: list[tuple[Tensor, Tensor, Tensor]] = []
        """Of each parameter stepped: whether it was finite, its count of steps, and that count before."""
        self.loss_finite: Tensor | None = None
        self.optimizer.begin_step()

    def squares(self) -> Tensor:
        """The squared L2 norm of all gradients of this step, before clipping, in float64."""
        return torch.stack(self.norms).double().square().sum()

    def take_back_counts(self) -> None:
        """Do not count the steps of this step's parameters that were not finite; waits for the device."""
        for finite, count, before in self.counts:
            if not finite.item():
                count.copy_(before)

    @torch.no_grad()
    def _step(self, p: Tensor, group: dict) -> None:
        norm = clip_one(p, self.optimizer.rows[p], self.clip())
        finite = norm.isfinite() if self.loss_finite is None else norm.isfinite() & self.loss_finite
        count = self.optimizer.count_of(p)
        self.counts.append((finite, count, count.clone()))
        self.optimizer.step_one(p, group, finite)
        self.norms.append(norm)
        p.grad = None


@torch.no_grad()
def clip_one(p: Tensor, rows: Rows, most: float | None) -> Tensor:
    """Clip a parameter's gradient to the norm `most` and return its norm before, in float64, without waiting for the
    device; a collective of its process group."""
    assert p.grad is not None
    gradient = local(p.grad)
    norm = rows.sum(torch.linalg.vector_norm(gradient, dtype=torch.float32).square()).double().sqrt()
    if most is not None:
        gradient.mul_(torch.where(norm > most, most / norm, 1.0).float().reshape(1))  # not rounded to bfloat16
    return norm
