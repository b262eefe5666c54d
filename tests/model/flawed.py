"""Layers and optimizers as their authors may get them wrong, each in one way."""

from typing import Literal

import torch
from torch import Tensor, nn

from lrtrain.layers.base import FactorizedLinear
from lrtrain.optim.adamw import AdamW


class Good(FactorizedLinear):
    """B A, without anything wrong."""

    roles = {"B.weight": "factor_left", "A.weight": "factor_right"}

    def __init__(self, in_features, out_features, bias, rank, device=None):
        super().__init__(in_features, out_features, rank)
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.B(self.A(x))

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{k}.weight": 0.02 * torch.randn(p.weight.shape, generator=generator) for k, p in self._modules.items()
        }

    def dense_weight(self) -> Tensor:
        return self.B.weight @ self.A.weight

    def singular_values(self) -> Tensor:
        return torch.linalg.svdvals(self.dense_weight().double())

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * (self.in_features + self.out_features)


class ManyKeys(Good):
    def __init__(self, **everything):
        super().__init__(**everything)


class NotAnnotated(Good):
    def __init__(self, in_features, out_features, bias, rank, alpha, device=None):
        super().__init__(in_features, out_features, bias, rank, device)


class OneOfTwo(Good):
    def __init__(self, in_features, out_features, bias, rank, kind: Literal["a", "b"] = "a", device=None):
        super().__init__(in_features, out_features, bias, rank, device)


class Unresolved(Good):
    def __init__(self, in_features, out_features, bias, rank: "Nowhere", device=None):  # noqa: F821
        super().__init__(in_features, out_features, bias, rank, device)


class WithoutDevice(Good):
    def __init__(self, in_features, out_features, bias, rank):
        super().__init__(in_features, out_features, bias, rank)


class OnlyLinear(nn.Linear): ...


class Unfinished(FactorizedLinear):
    roles = {}

    def forward(self, x: Tensor) -> Tensor:
        return x


class Forgets(Good):
    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"B.weight": super().init_parameters(generator)["B.weight"]}


class TooMany(Good):
    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return super().init_parameters(generator) | {"C": torch.zeros(1)}


class Turned(Good):
    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {key: value.T for key, value in super().init_parameters(generator).items()}


class Silent(Good):
    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return None  # pyright: ignore[reportReturnType]


class WithoutARole(Good):
    roles = {"B.weight": "factor_left"}


class OddRole(Good):
    roles = {"B.weight": "factor_left", "A.weight": "right"}  # pyright: ignore[reportAssignmentType]


class SilentPenalty(Good):
    def add_penalty(self) -> None: ...


class SilentProjection(Good):
    def after_step(self) -> None: ...


class Penalized(Good):
    penalized = True

    def add_penalty(self) -> None: ...


class Batch(Good):
    """Two matrices side by side, as one parameter of three dimensions."""

    roles = {"W": "matrix"}

    def __init__(self, in_features, out_features, bias, rank, device=None):
        FactorizedLinear.__init__(self, in_features, out_features, rank)
        self.W = nn.Parameter(torch.empty(2, out_features, in_features // 2, device=device))

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"W": 0.02 * torch.randn(self.W.shape, generator=generator)}

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...bi,boi->...o", x.unflatten(-1, (2, -1)), self.W)

    def dense_weight(self) -> Tensor:
        return torch.cat([*self.W], dim=1)


class FourDimensions(Batch):
    def __init__(self, in_features, out_features, bias, rank, device=None):
        FactorizedLinear.__init__(self, in_features, out_features, rank)
        self.W = nn.Parameter(torch.empty(2, 2, out_features // 2, in_features // 2, device=device))


class NoOptimizerOfOurs:
    def __init__(self, model, lr): ...


class TakesAll(AdamW):
    def __init__(self, model, **everything):
        super().__init__(model, **everything)
