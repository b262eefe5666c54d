"""W = B diag(g) A: a low-rank layer with one gate per rank."""

import torch
from torch import Tensor, nn

from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.factors import product_singular_values
from lrtrain.linalg.initial import spectral_factors


class GatedLinear(FactorizedLinear):
    """y = B (g ⊙ A x) + bias with A (rank, in), g (rank,) and B (out, rank)."""

    roles = {"B.weight": "factor_left", "A.weight": "factor_right", "gate": "singular_values", "B.bias": "bias"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        init_std: float,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank)
        self.init_std = init_std
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.gate = nn.Parameter(torch.empty(rank, device=device))
        self.B = nn.Linear(rank, out_features, bias=bias, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.gate * self.A(x))  # (..., in) → (..., rank) → (..., out)

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        left, right = spectral_factors(self.out_features, self.in_features, self.rank, self.init_std, generator)
        bias = {} if self.B.bias is None else {"B.bias": torch.zeros(self.out_features)}
        return {"B.weight": left, "A.weight": right, "gate": torch.ones(self.rank), **bias}

    def dense_weight(self) -> Tensor:
        return (self.B.weight * self.gate) @ self.A.weight

    def singular_values(self) -> Tensor:
        return product_singular_values(self.B.weight * self.gate, self.A.weight, 1.0)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * (self.in_features + self.out_features) + tokens * self.rank
