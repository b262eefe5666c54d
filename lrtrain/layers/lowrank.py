"""W = B A: the plain low-rank layer, trained from scratch."""

import copy
import math
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from lrtrain.errors import ConfigError
from lrtrain.layers.bottleneck import linear_with_residual, with_residual
from lrtrain.layers.rebalance import RebalancedLinear, balanced
from lrtrain.linalg.factors import product_singular_values
from lrtrain.linalg.initial import best_factors, normal, spectral_factors, uniform
from lrtrain.linalg.nearest import Fit

Init = Literal["spectral", "lora", "xavier", "cola"]


class LowRankLinear(RebalancedLinear):
    """y = B (A x) + bias with A (rank, in) and B (out, rank).

    Args:
        init: initial factors.
            `spectral`: BA is the best rank-r approximation of a dense N(0, init_std²) matrix, B and A balanced (as in
            LOST and Spectron).
            `lora`: A from U(±1/√in), B = 0 (Hu et al. 2021; the baseline row of the GaLore and SLTrain tables).
            `xavier`: normal with variances 2/(in + r) and 2/(r + out) (LORO, Mo et al., ICLR 2025).
            `cola`: both normal with std r^-¼ (out + in)^-¼, so that BA has std (out + in)^-½, and the bias from
            U(±1/√out) (CoLA's code). With the other choices the bias is zero.
        init_std: standard deviation of the dense initialization that `spectral` approximates.
        residual: add DLR's residual (residual_alpha/√K)·Expand_K(A x); see `with_residual`.
        rebalance_at: the step after which the factors are rebalanced to βU and ΣVᵀ/β; None: never. See
            `left_orthonormal`.

    Raises:
        ConfigError: if rebalance_at is given with a residual.
    """

    batchable = True
    splittable = True
    roles = {"B.weight": "factor_left", "A.weight": "factor_right", "B.bias": "bias"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        init: Init,
        init_std: PositiveFloat,
        residual: bool,
        residual_alpha: NonNegativeFloat,
        rebalance_at: PositiveInt | None,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank, rebalance_at)
        if residual and rebalance_at is not None:
            raise ConfigError(
                f"param.rebalance_at={rebalance_at} would change B, which the residual is added to; set it to "
                "null, or param.residual=false"
            )
        self.init = init
        self.init_std = init_std
        self.residual = residual
        self.residual_alpha = residual_alpha
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.latents(x))  # (..., in) → (..., rank) → (..., out)

    def latents(self, x: Tensor, first: int = 0) -> Tensor:
        return self.A(x)

    def expand(self, z: Tensor, first: int = 0) -> Tensor:
        if not self.residual:
            return self.B(z)
        return linear_with_residual(z, self.B.weight, self.B.bias, self.residual_alpha, first, self.out_features)

    def left(self) -> Tensor:
        """B (out, rank) with the residual added."""
        return with_residual(self.B.weight, self.residual_alpha) if self.residual else self.B.weight

    @torch.no_grad()
    def fold(self) -> Self:
        """An equivalent layer without residual."""
        plain = copy.deepcopy(self)
        plain.B.weight.copy_(self.left())
        plain.residual = False
        return plain

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        m, n, r = self.out_features, self.in_features, self.rank
        if self.init == "spectral":
            left, right = spectral_factors(m, n, r, self.init_std, generator)
        elif self.init == "lora":
            left, right = torch.zeros(m, r), uniform((r, n), 1 / math.sqrt(n), generator)
        elif self.init == "xavier":
            left = normal((m, r), math.sqrt(2 / (m + r)), generator)
            right = normal((r, n), math.sqrt(2 / (n + r)), generator)
        else:
            std = (r * (m + n)) ** -0.25
            left, right = normal((m, r), std, generator), normal((r, n), std, generator)
        if self.B.bias is None:
            return {"A.weight": right, "B.weight": left}
        bias = uniform((m,), 1 / math.sqrt(m), generator) if self.init == "cola" else torch.zeros(m)
        return {"A.weight": right, "B.weight": left, "B.bias": bias}

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        left, right = balanced(*fit.low_rank(weight, self.rank))
        if self.residual:
            left = left - with_residual(torch.zeros_like(left), self.residual_alpha)
        return {"A.weight": right, "B.weight": left}

    def factor_pair(self) -> tuple[str, str] | None:
        return None if self.residual else ("B.weight", "A.weight")

    def dense_weight(self) -> Tensor:
        return self.left() @ self.A.weight

    @property
    def spectrum_size(self) -> int:
        return self.rank

    def left_factor(self) -> Tensor | None:
        return None if self.residual else self.B.weight

    def right_factor(self) -> Tensor:
        return self.A.weight

    def singular_values(self) -> Tensor:
        return product_singular_values(self.left(), self.A.weight, 1.0)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * (self.in_features + self.out_features)

    @staticmethod
    def from_dense(weight: Tensor, rank: int, bias: Tensor | None = None) -> "LowRankLinear":
        """The layer whose W is the best rank-`rank` approximation of weight (out, in), in weight's dtype."""
        out_features, in_features = weight.shape
        layer = LowRankLinear(in_features, out_features, bias is not None, rank, "spectral", 0.02, False, 1.0, None).to(
            weight
        )
        left, right = best_factors(weight, rank)
        with torch.no_grad():
            layer.B.weight.copy_(left)
            layer.A.weight.copy_(right)
            if bias is not None:
                layer.B.bias.copy_(bias)
        return layer
