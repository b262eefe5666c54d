"""SLTrain: W = s·B A + S, a low-rank part plus values on a fixed random support.

Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", NeurIPS 2024,
arXiv 2406.02214, equation (1) and algorithm 1. Two executions of the same map:

* `materialize` (the paper's): W is built, used and dropped; the backward pass builds it again and forms the dense
  gradient G = gᵀx for a moment. No (out, in) tensor is saved between the passes.
* `factored`: y = s·(x Aᵀ) Bᵀ + x Sᵀ, and the gradient of the values is sampled on the support. No (out, in) tensor
  exists at any time, and the work shrinks with rank and density.
"""

import math
import time

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lrtrain.errors import ConfigError
from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.initial import spectral_factors, uniform
from lrtrain.layers.support import (
    compress_rows,
    draw_uniform,
    flat_positions,
    sampled_product,
    sparse_apply,
    sparse_apply_transposed,
)
from lrtrain.spectra.factors import dense_singular_values

EXECUTIONS = ("auto", "materialize", "factored")
INITS = ("published", "spectral")


def low_rank_scale(alpha: float, rank: int, rule: str) -> float:
    """The factor s before B A: α/r as published, α/√r, or α itself (`const`, which a sweep over ranks can hold)."""
    rules = {"alpha_over_r": alpha / rank, "alpha_over_sqrt_r": alpha / math.sqrt(rank), "const": alpha}
    if rule not in rules:
        raise ConfigError(f"param.scale={rule} is not one of {', '.join(rules)}")
    return rules[rule]


def compose(left: Tensor, right: Tensor, values: Tensor, crow: Tensor, col: Tensor, scale: float) -> Tensor:
    """W = scale·B A + S: B (out, r), A (r, in), values (nnz,) on the support → (out, in)."""
    weight = (scale * left) @ right
    weight.view(-1).index_add_(0, flat_positions(crow, col, right.shape[1]), values)
    return weight


class _Materialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, left, right, values, crow, col, scale):
        ctx.save_for_backward(x, left, right, values, crow, col)
        ctx.scale = scale
        return x @ compose(left, right, values, crow, col, scale).T

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, left, right, values, crow, col = ctx.saved_tensors
        dx = g @ compose(left, right, values, crow, col, ctx.scale) if ctx.needs_input_grad[0] else None
        dense = g.T @ x  # (out, in), only here and only for a moment
        d_left = ctx.scale * (dense @ right.T)
        d_right = ctx.scale * (left.T @ dense)
        return dx, d_left, d_right, dense.view(-1)[flat_positions(crow, col, right.shape[1])], None, None, None


class _Factored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, left, right, values, crow, col, scale):
        z = x @ right.T  # (tokens, r)
        ctx.save_for_backward(x, z, left, right, values, crow, col)
        ctx.scale = scale
        return torch.addmm(sparse_apply(values, crow, col, x), z, left.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, z, left, right, values, crow, col = ctx.saved_tensors
        dz = ctx.scale * (g @ left)  # (tokens, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(sparse_apply_transposed(values, crow, col, g, x.shape[1]), dz, right)
        return dx, ctx.scale * (g.T @ z), dz.T @ x, sampled_product(crow, col, g, x), None, None, None


def sltrain_linear(
    x: Tensor, left: Tensor, right: Tensor, values: Tensor, crow: Tensor, col: Tensor, scale: float, factored: bool
) -> Tensor:
    """x (..., in) → (..., out) by W = scale·B A + S, with the hand-written backward pass of the chosen execution."""
    function = _Factored if factored else _Materialized
    y = function.apply(x.reshape(-1, x.shape[-1]), left, right, values, crow, col, scale)
    return y.view(*x.shape[:-1], -1)


class SLTrainLinear(FactorizedLinear):
    """y = (s·B A + S) x + bias, S with ⌊density·out·in⌋ values on a uniformly random fixed support.

    Initial values: A ~ U(±1/√in), B = 0, values ~ U(±1/√in), bias ~ U(±1/√out), unless `init` says otherwise.

    Args:
        density: share of the entries of W that S holds (δ), from 0 to 1.
        alpha, scale: see `low_rank_scale`.
        execution: `materialize`, `factored`, or `auto`: whichever a measurement at the start of the run finds faster.
        init: `published`, as above; or `spectral`: s·B A is the best rank-r part of a dense N(0, init_std²) draw.
        init_std: standard deviation of the dense initialization that `spectral` imitates.

    Raises:
        ConfigError: for a density outside [0, 1] or an unknown scale, execution or init.
    """

    roles = {
        "B.weight": "factor_left",
        "A.weight": "factor_right",
        "values": "sparse_values",
        "B.bias": "bias",
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        density: float,
        alpha: float,
        scale: str,
        execution: str,
        init: str = "published",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank)
        if not 0 <= density <= 1:
            raise ConfigError(f"param.density={density} is not a share between 0 and 1")
        if execution not in EXECUTIONS:
            raise ConfigError(f"param.execution={execution} is not one of {', '.join(EXECUTIONS)}")
        if init not in INITS:
            raise ConfigError(f"param.init={init} is not one of {', '.join(INITS)}")
        self.init = init
        self.init_std = init_std
        self.scale = low_rank_scale(alpha, rank, scale)
        self.execution = execution
        self.nnz = math.floor(density * out_features * in_features)
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device)
        self.values = nn.Parameter(torch.empty(self.nnz, device=device))
        self.crow = nn.Buffer(torch.empty(out_features + 1, dtype=torch.int32, device=device), persistent=False)
        self.col = nn.Buffer(torch.empty(self.nnz, dtype=torch.int32, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        factored = self.execution == "factored"
        y = sltrain_linear(x, self.B.weight, self.A.weight, self.values, self.crow, self.col, self.scale, factored)
        return y if self.B.bias is None else y + self.B.bias

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        m, n = self.out_features, self.in_features
        bound = 1 / math.sqrt(n)
        state = {
            "A.weight": uniform((self.rank, n), bound, generator),
            "B.weight": torch.zeros(m, self.rank),
            "values": uniform((self.nnz,), bound, generator),
        }
        if self.init == "spectral":
            left, right = spectral_factors(m, n, self.rank, self.init_std, generator)
            state |= {"B.weight": left / math.sqrt(self.scale), "A.weight": right / math.sqrt(self.scale)}
        if self.B.bias is not None:
            state["B.bias"] = uniform((m,), 1 / math.sqrt(m), generator)
        return state

    def init_buffers(self, generator: torch.Generator) -> dict[str, Tensor]:
        positions = draw_uniform(self.out_features * self.in_features, self.nnz, generator)
        crow, col = compress_rows(positions, self.out_features, self.in_features)
        return {"crow": crow, "col": col}

    def dense_weight(self) -> Tensor:
        return compose(self.B.weight, self.A.weight, self.values, self.crow, self.col, self.scale)

    def singular_values(self) -> Tensor:
        return dense_singular_values(self.dense_weight())

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.rank * (self.in_features + self.out_features) + self.nnz)

    def settle(self, tokens: int, dtype: torch.dtype, device: torch.device) -> str:
        sparse_kernels = dtype in (torch.float32, torch.float64)
        if self.execution == "factored" and not sparse_kernels:
            raise ConfigError(f"param.execution=factored has no sparse kernels for {dtype}; use materialize or auto")
        if self.execution in ("materialize", "factored"):
            return self.execution
        if device.type != "cpu" or not sparse_kernels:
            return "materialize"
        return min(("materialize", "factored"), key=lambda e: _seconds(self, e, tokens, dtype))


def _seconds(layer: SLTrainLinear, execution: str, tokens: int, dtype: torch.dtype) -> float:
    """Best time of three forward and backward passes of `execution` on random tensors of this layer's shapes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.in_features, dtype=dtype, generator=generator)
    g = torch.randn(tokens, layer.out_features, dtype=dtype, generator=generator)
    state = {name: value.to(dtype) for name, value in layer.init_parameters(generator).items()}
    support = layer.init_buffers(generator)
    left, right, values = state["B.weight"], state["A.weight"], state["values"]
    for tensor in (x, left, right, values):
        tensor.requires_grad_()
    best = math.inf
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        y = sltrain_linear(
            x, left, right, values, support["crow"], support["col"], layer.scale, execution == "factored"
        )
        torch.autograd.grad(y, (x, left, right, values), g)
        best = min(best, time.perf_counter() - start)
    return best
