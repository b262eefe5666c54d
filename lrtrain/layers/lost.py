"""LOST: y = γ·B σ(A x) + (1-γ)·W_s x_I, a low-rank part plus whole columns of W.

Li et al., "LOST: Low-rank and Sparse Pre-training for Large Language Models", arXiv 2508.02668. Initial values come
from a dense random W ~ N(0, init_std²): BA is its best rank-r approximation; I are the columns with the largest norms
in the complement W - BA, and W_s holds W's values in them. I stays fixed.
"""

import math
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from lrtrain.config.ranges import Share
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.bottleneck import ACTIVATIONS, Activation, check_mergeable
from lrtrain.linalg.factors import dense_singular_values, product_singular_values
from lrtrain.linalg.initial import best_factors, normal, one_thread
from lrtrain.linalg.nearest import Fit, low_rank_plus_sparse

Select = Literal["svd_l2", "svd_l1", "weight_l2", "random"]


class LOSTLinear(FactorizedLinear):
    """y = γ·B σ(A x) + (1-γ)·W_s x_I + bias with A (rank, in), B (out, rank) and W_s (out, k), k = ⌊density·in⌋ or 1.

    Args:
        density: share of the input features that W_s reads (δ_c).
        gamma: weight γ of the low-rank part, from 0 to 1.
        activation: σ, `silu` or `none`.
        select: the columns I: those with the largest norm in the complement (`svd_l2`, `svd_l1`) or in W (`weight_l2`),
            or `random` ones.
        complement_rank: number of singular values after the first `rank` in the complement; None: all.
        init_std: standard deviation of the dense random W.
    """

    roles = {"B.weight": "factor_left", "A.weight": "factor_right", "sparse": "sparse_values", "B.bias": "bias"}
    init_version = 1
    splittable = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        density: Share,
        gamma: Share,
        activation: Activation,
        select: Select,
        complement_rank: PositiveInt | None,
        init_std: PositiveFloat,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank)
        self.count = max(1, math.floor(density * in_features))
        self.gamma = gamma
        self.activation = activation
        self.select = select
        self.complement_rank = complement_rank
        self.init_std = init_std
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device)
        self.sparse = nn.Parameter(torch.empty(out_features, self.count, device=device))
        self.columns = nn.Buffer(torch.empty(self.count, dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self._expand(self.A(x), x.index_select(-1, self.columns))

    def _expand(self, z: Tensor, chosen: Tensor) -> Tensor:
        """A x (..., rank) and x_I (..., k) → (..., out)."""
        z = ACTIVATIONS[self.activation](z)
        # One product: adding two would write and read (..., out) once more.
        inner = torch.cat([self.gamma * z, (1 - self.gamma) * chosen], dim=-1)  # (..., rank + k)
        return F.linear(inner, torch.cat([self.B.weight, self.sparse], dim=1), self.B.bias)

    def latents(self, x: Tensor, first: int = 0) -> Tensor:
        """A x and x_I (..., rank + k), with zeros for the columns that are not here."""
        columns = self.columns - first
        here = (columns >= 0) & (columns < x.shape[-1])
        chosen = x.index_select(-1, columns.clamp(0, x.shape[-1] - 1))
        return torch.cat([self.A(x), torch.where(here, chosen, 0)], dim=-1)

    def expand(self, z: Tensor, first: int = 0) -> Tensor:
        return self._expand(z[..., : self.rank], z[..., self.rank :])

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        weight = normal((self.out_features, self.in_features), self.init_std, generator)
        bias = {} if self.B.bias is None else {"B.bias": torch.zeros(self.out_features)}
        return self._start_from(weight, generator) | bias

    def _start_from(self, weight: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Values of factors, columns and W_s for a dense weight (out, in)."""
        more = self.complement_rank or 0
        with one_thread():
            left, right = best_factors(weight, min(self.rank + more, *weight.shape))
            scores = self._scores(weight, left, right, generator)
        columns = scores.topk(self.count).indices.sort().values
        return {
            "A.weight": right[: self.rank].to(weight.dtype),
            "B.weight": left[:, : self.rank].to(weight.dtype).contiguous(),
            "sparse": weight[:, columns],
            "columns": columns,
        }

    def check_start(self) -> None:
        check_mergeable(self.activation)
        if not 0 < self.gamma < 1:
            raise NotImplementedError(f"with param.gamma={self.gamma} one of the layer's two parts has weight zero")

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        """Columns chosen by `select`; then the γ·BA and (1-γ)·W_s whose sum is nearest to W."""
        columns = self._start_from(weight, generator)["columns"].to(weight.device)
        n = self.in_features
        positions = torch.arange(self.out_features, device=weight.device)[:, None] * n + columns
        left, right, values = low_rank_plus_sparse(weight, self.rank, fit, lambda _: positions.flatten())
        root = math.sqrt(self.gamma)
        sparse = values.view(self.out_features, self.count) / (1 - self.gamma)
        return {"A.weight": right / root, "B.weight": left / root, "sparse": sparse, "columns": columns}

    def _scores(self, weight: Tensor, left: Tensor, right: Tensor, generator: torch.Generator | None) -> Tensor:
        """The scores of the columns (in,); left and right are factors of W's approximation of rank r, or
        r + complement_rank."""
        if self.select == "random":
            return torch.rand(self.in_features, generator=generator)
        if self.select == "weight_l2":
            return weight.norm(dim=0)
        r = self.rank
        complement = weight - left @ right if self.complement_rank is None else left[:, r:] @ right[r:]
        return complement.norm(p=1 if self.select == "svd_l1" else 2, dim=0)

    def factor_pair(self) -> tuple[str, str] | None:
        return ("B.weight", "A.weight") if self.activation == "none" else None

    def dense_weight(self) -> Tensor:
        check_mergeable(self.activation)
        return self._weight()

    def _weight(self) -> Tensor:
        low_rank = self.gamma * (self.B.weight @ self.A.weight)
        return low_rank.index_add(1, self.columns, self.sparse, alpha=1 - self.gamma)

    def parts(self) -> tuple[Tensor, Tensor]:
        low_rank = self.gamma * (self.B.weight @ self.A.weight)
        sparse = torch.zeros_like(low_rank).index_add(1, self.columns, self.sparse, alpha=1 - self.gamma)
        return low_rank, sparse

    @property
    def spectrum_size(self) -> int:
        return min(self.rank + self.count, self.in_features, self.out_features)

    def left_factor(self) -> Tensor | None:
        if self.rank + self.count > self.spectrum_size:
            return None
        return torch.cat([self.gamma * self.B.weight, (1 - self.gamma) * self.sparse], dim=1)  # (out, r + k)

    def right_factor(self) -> Tensor:
        rows = torch.zeros_like(self.A.weight[:1]).repeat(self.count, 1).scatter_(1, self.columns[:, None], 1.0)
        return torch.cat([self.A.weight, rows])  # (r + k, in)

    def singular_values(self) -> Tensor:
        left = self.left_factor()
        if left is None:
            return dense_singular_values(self._weight())
        return product_singular_values(left, self.right_factor(), 1.0)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.rank * (self.in_features + self.out_features) + self.count * self.out_features)

    @staticmethod
    def from_dense(
        weight: Tensor, rank: int, density: float, gamma: float, select: Select, bias: Tensor | None = None
    ) -> "LOSTLinear":
        """The layer without activation, initialized from weight (out, in) instead of a random W, in weight's dtype."""
        out_features, in_features = weight.shape
        layer = LOSTLinear(
            in_features, out_features, bias is not None, rank, density, gamma, "none", select, None, 0.02
        ).to(weight)
        state = layer._start_from(weight) | ({} if bias is None else {"B.bias": bias})
        layer.load_state_dict(state)
        return layer
