"""ReLoRA: W = W₀ + s·B A, where the trained B A is periodically merged into the frozen W₀.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", ICLR 2024, arXiv 2307.05695. Each merge has
rank at most r, but their sum may have more. After a merge A is random again, B is zero and most of their optimizer
state is pruned; the published learning rate restarts with each merge (`schedule=cosine_restarts`).

Two differences from the published code: it starts with A = B = 0, so that both gradients are zero until the first merge
draws A, whereas here A is random from the start; and there is no dropout (0.1 in the published code) on the branch's
input.

Pruning removes the same entries of both of Adam's moments. The gradient of A is zero in the step after a merge, so a
first moment that is left without its second moment would move A by lr·m/eps.
"""

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from lrtrain.config.ranges import Share
from lrtrain.layers.base import FactorizedLinear, Reset
from lrtrain.layers.sltrain import ScaleRule, low_rank_scale
from lrtrain.linalg.factors import dense_singular_values
from lrtrain.linalg.initial import normal, uniform
from lrtrain.linalg.nearest import Fit


class ReLoRALinear(FactorizedLinear):
    """y = W₀ x + s·B (A x) + bias with a frozen W₀ (out, in), A (rank, in) and B (out, rank).

    Initial values: W₀ ~ N(0, init_std²), A ~ U(±1/√in), B = 0.

    Args:
        merge_every: steps between merges.
        alpha, scale: see `low_rank_scale`.
        prune: share of the entries of A's and B's moments that a merge sets to zero, from 0 to 1.
        prune_by: entries to prune: `magnitude` (the smallest) or `random`.
        restart_counter: whether a merge also resets the optimizer's step counter of A and B.
        init_std: standard deviation of W₀.
    """

    roles = {"weight": "frozen", "A.weight": "factor_right", "B.weight": "factor_left", "bias": "bias"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        merge_every: PositiveInt,
        alpha: PositiveFloat,
        scale: ScaleRule,
        prune: Share,
        prune_by: Literal["magnitude", "random"],
        restart_counter: bool,
        init_std: PositiveFloat,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank)
        self.merge_every = merge_every
        self.scale = low_rank_scale(alpha, rank, scale)
        self.reset = Reset(prune, prune_by, restart_counter)
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device), requires_grad=False)
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=False, device=device)
        self.bias = nn.Parameter(torch.empty(out_features, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.B(self.scale * self.A(x))

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        m, n = self.out_features, self.in_features
        bias = {} if self.bias is None else {"bias": torch.zeros(m)}
        return {
            "weight": normal((m, n), self.init_std, generator),
            "A.weight": self._fresh(generator),
            "B.weight": torch.zeros(m, self.rank),
            **bias,
        }

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        left = torch.zeros(self.out_features, self.rank)
        return {"weight": weight, "A.weight": self._fresh(generator), "B.weight": left}

    def factor_pair(self) -> tuple[str, str]:
        return ("B.weight", "A.weight")

    def dense_weight(self) -> Tensor:
        return torch.addmm(self.weight, self.B.weight, self.A.weight, alpha=self.scale)

    def singular_values(self) -> Tensor:
        return dense_singular_values(self.dense_weight())

    def flops(self, tokens: int) -> int:
        m, n = self.out_features, self.in_features
        return 2 * tokens * (m * n + self.rank * (m + n))

    def training_flops(self, tokens: int) -> int:
        return 3 * self.flops(tokens) - 2 * tokens * self.out_features * self.in_features  # no gradient of W₀

    # --- what happens between steps --------------------------------------------------------------------------------

    def revision_due(self, step: int) -> bool:
        return step % self.merge_every == 0

    def revise(self, step: int, generator: torch.Generator) -> None:
        self.weight.copy_(self.dense_weight())
        self.A.weight.copy_(self._fresh(generator))
        self.B.weight.zero_()

    def resets(self, step: int) -> dict[str, Reset]:
        return {"A.weight": self.reset, "B.weight": self.reset}

    def _fresh(self, generator: torch.Generator) -> Tensor:
        return uniform((self.rank, self.in_features), 1 / math.sqrt(self.in_features), generator)

    @classmethod
    def from_dense(cls, weight: Tensor, rank: int, bias: Tensor | None = None) -> "ReLoRALinear":
        """The layer with W₀ = weight (out, in), in its dtype, B = 0, and A from torch's global generator."""
        out_features, in_features = weight.shape
        layer = cls(
            in_features, out_features, bias is not None, rank,
            merge_every=1000, alpha=32.0, scale="alpha_over_r", prune=0.999, prune_by="random", restart_counter=False,
            init_std=0.02,
        ).to(weight)  # fmt: skip
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.B.weight.zero_()
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer
