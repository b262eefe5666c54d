"""W_b = c_b·B[:, :b] A[:b] for every b ≤ r in one layer: trained at many ranks, truncated to any, and able to shrink.

Rank sampling is DyLoRA's (Valipour et al., EACL 2023) in the form that trains the whole prefix; the hierarchical
group lasso and the shrinking are Maestro's (Horváth et al., ICML 2024), who prove that ordered dropout on a linear map
recovers its singular vectors in order.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import linear

from lrtrain.config.ranges import PositiveShare, Share, ShareBelowOne
from lrtrain.distributed.sharding import whole
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.linalg.factors import product_singular_values
from lrtrain.linalg.initial import spectral_factors
from lrtrain.linalg.nearest import Fit

SCALES = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
"""c_b = (r/b)^exponent."""


def nested_linear(x: Tensor, left: Tensor, right: Tensor, rank: int, scale: float) -> Tensor:
    """x (..., in) → c·B[:, :b] (A[:b] x) (..., out) for B = `left` (out, r), A = `right` (r, in) and b = `rank`."""
    z = linear(x, right[:rank])  # (..., in) → (..., b)
    return linear(z if scale == 1 else scale * z, left[:, :rank])


Scale = Literal["none", "sqrt", "linear"]


class NestedLinear(FactorizedLinear):
    """y = c_b·B[:, :b] (A[:b] x) + bias with A (rank, in), B (out, rank), initialized by an SVD.

    In training mode b is drawn before each step, the same share of the rank in all layers; in eval mode b is the
    whole rank, or the rank set by `truncate`.

    Args:
        init_std: standard deviation of the dense initialization that BA approximates.
        ranks: shares of the rank that are trained, each in (0, 1].
        sampling: the rank trained in a step. `shares`: the whole rank with probability `full_share`, else one of the
            smaller `ranks`, uniformly. `uniform`: any rank from 1 to the whole one, as in DyLoRA (which trains only the
            last row and column of it; here the whole prefix is trained).
        full_share: see sampling.
        scale: c_b. `none`: 1, `sqrt`: √(r/b), `linear`: r/b (DyLoRA's).
        lasso: λ of the hierarchical group lasso λ·Σ_b (‖B[:, b:]‖_F + ‖A[b:]‖_F), 0 ≤ b < r.
        shrink_every: steps between attempts to shrink the rank; 0: never.
        shrink_threshold: share of ‖BA‖_F² that a smaller rank may drop.
    """

    roles = {"B.weight": "factor_left", "A.weight": "factor_right", "B.bias": "bias"}

    splittable = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        init_std: PositiveFloat,
        ranks: Annotated[list[PositiveShare], Field(min_length=1)],
        sampling: Literal["shares", "uniform"],
        full_share: Share,
        scale: Scale,
        lasso: NonNegativeFloat,
        shrink_every: NonNegativeInt,
        shrink_threshold: ShareBelowOne,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank)
        self.init_std = init_std
        self.ranks = sorted({*ranks, 1.0})
        self.sampling = sampling
        self.full_share = full_share if self.smaller else 1.0
        self.exponent = SCALES[scale]
        self.lasso = lasso
        self.penalized = lasso > 0
        self.shrink_every = shrink_every
        self.shrink_threshold = shrink_threshold
        self.drawn = rank  # b in training mode
        self.kept = rank  # b in eval mode
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device)

    @property
    def smaller(self) -> Sequence[float]:
        """The shares below the whole rank."""
        return self.ranks[:-1]

    def rank_at(self, share: float) -> int:
        """The rank for a share of the whole rank."""
        return max(1, round(share * self.rank))

    def scale_at(self, rank: int) -> float:
        """c_b."""
        return (self.rank / rank) ** self.exponent

    def forward(self, x: Tensor) -> Tensor:
        rank = self._rank_in_use()
        y = nested_linear(x, self.B.weight, self.A.weight, rank, self.scale_at(rank))
        return y if self.B.bias is None else y + self.B.bias

    def latents(self, x: Tensor, first: int = 0) -> Tensor:
        return linear(x, self.A.weight[: self._rank_in_use()])

    def expand(self, z: Tensor, first: int = 0) -> Tensor:
        rank = self._rank_in_use()
        return linear(self.scale_at(rank) * z, self.B.weight[:, :rank], self.B.bias)

    def _rank_in_use(self) -> int:
        return self.drawn if self.training else self.kept

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        left, right = spectral_factors(self.out_features, self.in_features, self.rank, self.init_std, generator)
        bias = {} if self.B.bias is None else {"B.bias": torch.zeros(self.out_features)}
        return {"A.weight": right, "B.weight": left, **bias}

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        left, right = fit.low_rank(weight, self.rank)  # in order, so that each W_b is the best approximation of rank b
        return {"A.weight": right, "B.weight": left}

    @property
    def spectrum_size(self) -> int:
        return self.kept

    def left_factor(self) -> Tensor:
        return self.scale_at(self.kept) * self.B.weight[:, : self.kept]

    def right_factor(self) -> Tensor:
        return self.A.weight[: self.kept]

    def dense_weight(self) -> Tensor:
        return self.left_factor() @ self.right_factor()

    def singular_values(self) -> Tensor:
        return product_singular_values(self.left_factor(), self.right_factor(), 1.0)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.rank * (self.in_features + self.out_features)

    def training_flops(self, tokens: int) -> int:
        """FLOPs of forward and backward pass at the expected b."""
        return round(6 * tokens * self._expected_rank() * (self.in_features + self.out_features))

    def _expected_rank(self) -> float:
        if self.sampling == "uniform":
            return (1 + self.rank) / 2
        smaller = [self.rank_at(share) for share in self.smaller]
        others = sum(smaller) / len(smaller) if smaller else 0.0
        return self.full_share * self.rank + (1 - self.full_share) * others

    # --- between steps ---------------------------------------------------------------------------------------------

    def draw(self, generator: torch.Generator) -> None:
        if self.sampling == "uniform":  # one draw for layers of all ranks, so that all use the same share
            self.drawn = 1 + int(torch.rand((), generator=generator) * self.rank)
        elif torch.rand((), generator=generator) < self.full_share:
            self.drawn = self.rank
        else:
            index = torch.randint(len(self.smaller), (), generator=generator)
            self.drawn = self.rank_at(self.smaller[int(index)])

    @torch.no_grad()
    def add_penalty(self) -> None:
        left, right = self.B.weight, self.A.weight
        _add_scaled(left, self.lasso * tail_weights(whole(left.square().sum(0))))
        _add_scaled(right, self.lasso * tail_weights(whole(right.square().sum(1)))[:, None])

    def resize_due(self, step: int) -> bool:
        return self.shrink_every > 0 and step % self.shrink_every == 0

    def wanted_rank(self) -> int:
        dropped = dropped_energies(self.B.weight, self.A.weight)
        enough = (dropped <= self.shrink_threshold * dropped[0]).nonzero()
        return max(1, int(enough[0])) if len(enough) else self.rank

    # --- truncation ---------------------------------------------------------------------------------------------------

    def ranks_to_evaluate(self) -> dict[float, int]:
        return {share: self.rank_at(share) for share in self.ranks}

    def truncate(self, rank: int) -> None:
        self.kept = rank

    @classmethod
    def from_dense(cls, weight: Tensor, rank: int, bias: Tensor | None = None, scale: Scale = "none") -> "NestedLinear":
        """The layer whose W_b is c_b times the best rank-b approximation of weight (out, in), for every b ≤ rank."""
        best = LowRankLinear.from_dense(weight, rank, bias)
        layer = cls(
            best.in_features, best.out_features, bias is not None, rank, init_std=0.02, ranks=[1.0], sampling="shares",
            full_share=1.0, scale=scale, lasso=0.0, shrink_every=0, shrink_threshold=0.0,
        ).to(weight)  # fmt: skip
        layer.load_state_dict(best.state_dict())
        return layer


def dropped_energies(left: Tensor, right: Tensor) -> Tensor:
    """‖B[:, b:] A[b:]‖_F² for b = 0 … r−1, float64: the energy that truncating W = BA to rank b drops.

    With the Grams G = BᵀB and H = AAᵀ it is the sum of the entries of G∘H from (b, b) on.
    """
    left, right = left.double(), right.double()
    entries = (left.T @ left) * (right @ right.T)  # (r, r)
    return entries.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()


def tail_weights(energies: Tensor) -> Tensor:
    """w_j = Σ_{b ≤ j} 1/t_b (r,), by which the gradient of Σ_b t_b multiplies column j. t_b are the tail norms of
    columns with squared norms `energies` (r,); a zero tail contributes nothing."""
    tails = energies.flip(0).cumsum(0).flip(0).sqrt()
    return torch.where(tails > 0, 1 / tails, 0).cumsum(0)


def _add_scaled(parameter: Tensor, factors: Tensor) -> None:
    """Add parameter·factors to the parameter's gradient, shard by shard; `factors` is broadcast, and unsharded."""
    assert parameter.grad is not None
    if not isinstance(parameter, DTensor):
        parameter.grad.add_(parameter * factors)
        return
    mesh = parameter.device_mesh
    product = parameter * DTensor.from_local(factors, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # torch has gathered it if there are fewer rows than shards
    parameter.grad.add_(cast(DTensor, product).redistribute(mesh, parameter.placements))
