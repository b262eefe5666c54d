"""SST: W = U diag(σ) Vᵀ at full rank; every step trains all of σ and a few of the singular vectors.

Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks", ICML 2025,
arXiv 2405.15481. With q = min(out, in):

* every step trains all q singular values and the vectors u_i, v_i of the r active indices i, then restores σ ≥ 0 and
  ‖u_i‖ = ‖v_i‖ = 1;
* every *iteration* (a number of steps) new active indices are drawn without replacement, i with probability
  p_i = ½(1/q + σ_i/Σσ); the vectors' optimizer state is cleared and their learning rate warms up again;
* every *round* (a number of iterations) the SVD of W is computed, which makes the vectors orthonormal again.

With G = ∂L/∂W the *enhanced* gradients of the vectors are G v_i and Gᵀu_i. The true gradients have an additional factor
σ_i, and would hardly move the vectors of small singular values.
"""

import math

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrtrain.distributed.sharding import local
from lrtrain.layers.base import FactorizedLinear, Reset
from lrtrain.linalg.factors import product_singular_values
from lrtrain.linalg.initial import gaussian_svd
from lrtrain.linalg.nearest import Fit


class _Spectral(torch.autograd.Function):
    """y = U(σ∘(Vᵀx)) from the blocks of active and frozen vectors; neither pass forms an (out, in) tensor."""

    @staticmethod
    def forward(ctx, x, sigma, left, right, left_frozen, right_frozen, order, enhanced):
        active, frozen = sigma[order].split([len(left), len(left_frozen)])
        z, z_frozen = x @ right.T, x @ right_frozen.T  # (tokens, r), (tokens, q - r)
        ctx.save_for_backward(x, z, z_frozen, sigma, left, right, left_frozen, right_frozen, order)
        ctx.enhanced = enhanced
        return torch.addmm((z * active) @ left, z_frozen * frozen, left_frozen)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, z, z_frozen, sigma, left, right, left_frozen, right_frozen, order = ctx.saved_tensors
        active, frozen = sigma[order].split([len(left), len(left_frozen)])
        gu, gu_frozen = g @ left.T, g @ left_frozen.T  # (tokens, r), (tokens, q - r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm((gu * active) @ right, gu_frozen * frozen, right_frozen)
        in_order = torch.cat([(gu * z).sum(0), (gu_frozen * z_frozen).sum(0)])  # u_iᵀ G v_i
        d_sigma = torch.empty_like(sigma).index_copy(0, order, in_order)
        d_left, d_right = z.T @ g, gu.T @ x  # the rows G v_i and Gᵀu_i of active i
        if not ctx.enhanced:
            d_left, d_right = active[:, None] * d_left, active[:, None] * d_right
        return dx, d_sigma, d_left, d_right, None, None, None, None


def active_probabilities(sigma: Tensor) -> Tensor:
    """p_i = ½(1/q + σ_i/Σσ), float64 on the CPU: half uniform, half by magnitude."""
    sigma = sigma.detach().double().cpu()
    return (1 / len(sigma) + sigma / sigma.sum().clamp_min(torch.finfo(torch.float64).tiny)) / 2


def draw_order(sigma: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """A permutation of the indices of σ (q,), int64: the `rank` new active ones, then the others, both ascending."""
    active = torch.zeros(len(sigma), dtype=torch.bool)
    active[torch.multinomial(active_probabilities(sigma), rank, replacement=False, generator=generator)] = True
    return torch.cat([active.nonzero(), (~active).nonzero()]).flatten()


def in_blocks(u: Tensor, v: Tensor, order: Tensor, rank: int) -> dict[str, Tensor]:
    """The layer's blocks and `order` for vectors in natural order, stored as rows: u (q, out), v (q, in)."""
    order = order.to(u.device)
    active, frozen = order[:rank], order[rank:]
    return {
        "left": u[active],
        "right": v[active],
        "left_frozen": u[frozen],
        "right_frozen": v[frozen],
        "order": order,
    }


class SSTLinear(FactorizedLinear):
    """y = U(σ∘(Vᵀx)) + bias, U (out, q) and V (in, q) stored as rows, in a trained and a frozen block.

    σ is in natural order. `order` (q,) is a permutation of its indices: the rows of `left` (r, out) and `right` (r, in)
    are u_i and v_i for its first r indices, those of `left_frozen` and `right_frozen` for the rest. Weight decay has no
    effect on the vectors, which are normalized after each step, and is not applied to σ.

    Args:
        iteration: steps between draws of the active indices (T3).
        round: iterations between SVDs of W (T2); None: ⌈q/r⌉, so that each index is expected to be active once a round.
        warmup: steps at the start of each iteration over which the vectors' learning rate rises linearly from zero.
        enhanced: use the vectors' enhanced gradients, as published.
        init_std: standard deviation of the dense initialization whose SVD the layer starts from.
    """

    roles = {
        "sigma": "singular_values",
        "left": "factor_left",
        "right": "factor_right",
        "left_frozen": "frozen",
        "right_frozen": "frozen",
        "bias": "bias",
    }
    paced = frozenset({"left", "right"})
    constrained = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        iteration: PositiveInt,
        round: PositiveInt | None,
        warmup: NonNegativeInt,
        enhanced: bool,
        init_std: PositiveFloat,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank)
        full_rank = min(in_features, out_features)
        self.iteration = iteration
        self.steps_per_round = iteration * (round or math.ceil(full_rank / rank))
        self.warmup = warmup
        self.enhanced = enhanced
        self.init_std = init_std

        def parameter(*shape: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device), requires_grad=trained)

        self.sigma = parameter(full_rank)
        self.left = parameter(rank, out_features)
        self.right = parameter(rank, in_features)
        self.left_frozen = parameter(full_rank - rank, out_features, trained=False)
        self.right_frozen = parameter(full_rank - rank, in_features, trained=False)
        self.order = nn.Buffer(torch.empty(full_rank, dtype=torch.int64, device=device))
        self.bias = parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        vectors = (self.left, self.right, self.left_frozen, self.right_frozen)
        y = _Spectral.apply(flat, self.sigma, *vectors, self.order, self.enhanced).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        m, n, q = self.out_features, self.in_features, len(self.sigma)
        left, sigma, right = gaussian_svd(m, n, q, self.init_std, generator)
        order = draw_order(sigma, self.rank, generator)
        bias = {} if self.bias is None else {"bias": torch.zeros(m)}
        return {"sigma": sigma.float(), **in_blocks(left.T, right.T, order, self.rank), **bias}

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        return {"sigma": sigma, **in_blocks(u.T, vt, draw_order(sigma, self.rank, generator), self.rank)}

    def dense_weight(self) -> Tensor:
        active, frozen = self.sigma[self.order].split([self.rank, len(self.left_frozen)])
        return (self.left.T * active) @ self.right + (self.left_frozen.T * frozen) @ self.right_frozen

    def singular_values(self) -> Tensor:
        # Not σ: between SVDs the vectors are not exactly orthogonal.
        left, right = torch.cat([self.left, self.left_frozen]), torch.cat([self.right, self.right_frozen])
        return product_singular_values(left.T * self.sigma[self.order], right, 1.0)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * len(self.sigma) * (self.in_features + self.out_features)

    def training_flops(self, tokens: int) -> int:
        both = self.in_features + self.out_features
        return 2 * self.flops(tokens) + 2 * tokens * self.rank * both  # the backward pass to x; to the active vectors

    # --- what happens between steps --------------------------------------------------------------------------------

    def after_step(self) -> None:
        local(self.sigma).clamp_min_(0)
        for vectors in (local(self.left), local(self.right)):  # shards of whole rows
            vectors.div_(vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny))

    def revision_due(self, step: int) -> bool:
        return step % self.iteration == 0

    def revise(self, step: int, generator: torch.Generator) -> None:
        u, v = self._vectors()
        if step % self.steps_per_round == 0:
            weight = (u.double().T * self.sigma) @ v.double()  # (out, in)
            left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
            u, v = left.T.to(u), right.to(v)
            self.sigma.copy_(sigma)
        self._take(in_blocks(u, v, draw_order(self.sigma, self.rank, generator), self.rank))

    def resets(self, step: int) -> dict[str, Reset]:
        # An SVD reorders the singular values; otherwise only the vectors move between the blocks.
        names = ("left", "right", "sigma") if step % self.steps_per_round == 0 else ("left", "right")
        return {name: Reset() for name in names}

    def lr_factor(self, step: int) -> float:
        return min(1.0, (step % self.iteration + 1) / max(1, self.warmup))

    def _vectors(self) -> tuple[Tensor, Tensor]:
        """All u_i (q, out) and v_i (q, in) in natural order."""
        u, v = torch.cat([self.left, self.left_frozen]), torch.cat([self.right, self.right_frozen])
        return torch.empty_like(u).index_copy(0, self.order, u), torch.empty_like(v).index_copy(0, self.order, v)

    def _take(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            getattr(self, name).copy_(value)

    @classmethod
    def from_dense(
        cls, weight: Tensor, rank: int, bias: Tensor | None = None, iteration: int = 200, enhanced: bool = True
    ) -> "SSTLinear":
        """The layer with W = weight (out, in), in its dtype; the vectors of the largest singular values are active."""
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, bias is not None, rank, iteration, None, 20, enhanced, 0.02).to(weight)
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        with torch.no_grad():
            layer.sigma.copy_(sigma)
            layer._take(in_blocks(u.T, vt, torch.arange(len(sigma)), rank))
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer
