"""Fira: GaLore that also steps along what the projection drops (Chen et al., arXiv 2410.01623)."""

from typing import Literal, Unpack

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from lrtrain.distributed.sharding import local
from lrtrain.optim.adam import bias_correction
from lrtrain.optim.galore import GaLore, GaLoreSettings
from lrtrain.optim.projections import Total
from lrtrain.optim.scaling import limit_growth, row_factors
from lrtrain.optim.stacks import Stack
from lrtrain.optim.subspace import Projected


class Fira(GaLore):
    """Fira: GaLore's step plus the residual of the gradient, each row scaled as Adam scales the row's projection.

    State: GaLore's and a norm.

    Args:
        residual: `paper`: G − G P Pᵀ; `code`: G − scale·G P Pᵀ, as in the published code.
        max_growth: limit on the growth of the scaled residual's norm from one step to the next.
    """

    replicated = frozenset({"basis", "norm"})

    def __init__(
        self,
        model: nn.Module,
        *,
        residual: Literal["paper", "code"],
        max_growth: PositiveFloat,
        **galore: Unpack[GaLoreSettings],
    ):
        self.residual = residual
        self.max_growth = max_growth
        super().__init__(model, **galore)

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        return super().new_state(p) | {"norm": torch.zeros((), device=local(p).device)}

    def lifted(self, stack: Stack, gradient: Tensor, found: Projected, state: dict[str, Tensor], step: int) -> Tensor:
        return fira_step(
            gradient,
            *found,
            state["norm"],
            self.scale,
            1.0 if self.residual == "paper" else self.scale,
            self.max_growth,
            bias_correction(step, self.beta1, self.beta2),
            stack.rows.sum,
        )


def fira_step(
    gradient: Tensor,
    basis: Tensor,
    projected: Tensor,
    adam: Tensor,
    norm: Tensor,
    scale: float,
    removed: float,
    max_growth: float,
    correction: float,
    total: Total,
) -> Tensor:
    """scale·u Pᵀ + limited(diag(φ) (G − removed·g Pᵀ)) with φ_i = ‖u_i‖ / ‖g_i‖ for each row.

    Args:
        gradient: G ([members,] rows, n), overwritten.
        basis: P ([members,] n, r).
        projected, adam: g = G P and Adam's step u on it, both ([members,] rows, r).
        norm: the norm of the scaled residual in the last step ([members]); updated in place.
        correction, total: see `limit_growth`.
    """
    add_product = torch.Tensor.addmm_ if gradient.ndim == 2 else torch.Tensor.baddbmm_
    residual = add_product(gradient, projected, basis.mT, alpha=-removed).mul_(row_factors(adam, projected))
    limited = limit_growth(residual, norm, max_growth, correction, total)
    return add_product(limited, adam, basis.mT, alpha=scale)
