"""SLTrain: W = s·B A + S, a low-rank part plus values on a fixed random support.

Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", NeurIPS 2024,
arXiv 2406.02214, equation (1) and algorithm 1. Three executions of the same map:

* `materialize` (as in the paper): forms W, uses it and frees it; the backward pass forms W again, and the dense
  gradient G = gᵀx. No (out, in) tensor is saved between the passes.
* `factored`: y = s·(x Aᵀ) Bᵀ + x Sᵀ, and the gradient of the values is computed on the support only. No (out, in)
  tensor is ever formed, and the work shrinks with rank and density.
* `triton`: the same with the kernels of `block_kernels`, for `support=block` on CUDA. No gathered copy of x is formed
  either.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from lrtrain.config.ranges import Share
from lrtrain.errors import ConfigError
from lrtrain.layers import block_products
from lrtrain.layers.autotune import fastest
from lrtrain.layers.rebalance import RebalancedLinear
from lrtrain.layers.sltrain_product import add_sparse_, compose, sltrain_linear
from lrtrain.layers.sparse_support import (
    column_dtype,
    compress_rows,
    draw_rows,
    draw_uniform,
    flat_positions,
)
from lrtrain.linalg.factors import dense_singular_values
from lrtrain.linalg.initial import spectral_factors, uniform
from lrtrain.linalg.nearest import Fit, low_rank_plus_sparse

EXECUTIONS = ("materialize", "factored", "triton")  # `auto` is one of these
ScaleRule = Literal["alpha_over_r", "alpha_over_sqrt_r", "const"]


def low_rank_scale(alpha: float, rank: int, rule: ScaleRule) -> float:
    """The factor s in s·B A: α/r as published, α/√r, or α itself (`const`, independent of the rank)."""
    rules = {"alpha_over_r": alpha / rank, "alpha_over_sqrt_r": alpha / math.sqrt(rank), "const": alpha}
    return rules[rule]


class SLTrainLinear(RebalancedLinear):
    """y = (s·B A + S) x + bias, S with values on a fixed support.

    Published initial values: A ~ U(±1/√in), B = 0, values ~ U(±1/√in), bias ~ U(±1/√out).

    Args:
        density: share δ of the entries of W that S holds, from 0 to 1.
        support: form of the support.
            `uniform`: ⌊δ·out·in⌋ entries anywhere (as published).
            `row_balanced`: equally many entries per row, out·round(δ·in) in total; needs no row pointers.
            `block`: b×b blocks, equally many per block row, out·b·max(1, round(δ·in/b)) entries in total. Factored
            execution is then a few batched matrix products, on every device and in every dtype.
        select: `random` entries, regenerated from the seed; or with a start from a weight the largest entries of
            W - s·BA (`residual`), which are stored in checkpoints.
        block: b, the side of a block, for `support=block`.
        alpha, scale: see `low_rank_scale`.
        execution: `materialize`, `factored`, `triton`, or `auto` (the fastest of those that run on the device).
        init: `published`, as above; or `spectral`: s·B A is the best rank-r approximation of a dense N(0, init_std²)
            matrix.
        init_std: standard deviation of the dense initialization that `spectral` approximates.
        rebalance_at: the step after which the factors are rebalanced to βU and ΣVᵀ/β; None: never. See
            `left_orthonormal`.

    Raises:
        ConfigError: if the block does not divide the shape.
    """

    batchable = True
    roles = {
        "B.weight": "factor_left",
        "A.weight": "factor_right",
        "values": "sparse_values",
        "B.bias": "bias",
    }
    crow: Tensor | None
    col: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        density: Share,
        support: Literal["uniform", "row_balanced", "block"],
        block: PositiveInt,
        alpha: PositiveFloat,
        scale: ScaleRule,
        execution: Literal["auto", "materialize", "factored", "triton"],
        select: Literal["random", "residual"],
        init: Literal["published", "spectral"],
        init_std: PositiveFloat,
        rebalance_at: PositiveInt | None,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, rank, rebalance_at)
        self.init = init
        self.init_std = init_std
        if support == "block":
            _check_block(block, out_features, in_features)
        self.support = support
        self.select = select
        self.block = block if support == "block" else 1
        self.scale = low_rank_scale(alpha, rank, scale)
        self.execution = execution
        rows, columns = out_features // self.block, in_features // self.block
        if support == "uniform":
            self.nnz = math.floor(density * out_features * in_features)
            shape, crow = (self.nnz,), torch.empty(rows + 1, dtype=torch.int32, device=device)
        else:
            count = max(1, round(density * columns)) if density else 0  # blocks in a block row
            self.nnz = out_features * count * self.block
            shape, crow = (rows, count), None
        self.A = nn.Linear(in_features, rank, bias=False, device=device)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device)
        trained = self.nnz > 0  # engines cannot reduce empty gradients
        self.values = nn.Parameter(torch.empty(self.nnz, device=device), requires_grad=trained)
        stored = select == "residual"
        self.register_buffer("crow", crow, persistent=stored)
        self.col = nn.Buffer(torch.empty(shape, dtype=column_dtype(columns), device=device), persistent=stored)

    def forward(self, x: Tensor) -> Tensor:
        support = (self.values, self.crow, self.col, self.block)
        y = sltrain_linear(x, self.B.weight, self.A.weight, *support, self.scale, self.execution)
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
        return state if self.select == "random" else state | self.draw_support(generator)

    def init_buffers(self, generator: torch.Generator) -> dict[str, Tensor]:
        return self.draw_support(generator) if self.select == "random" else {}

    def draw_support(self, generator: torch.Generator) -> dict[str, Tensor]:
        """`col`, and `crow` for a uniform support, of a random support."""
        m, n = self.out_features, self.in_features
        if self.crow is not None:
            crow, col = compress_rows(draw_uniform(m * n, self.nnz, generator), m, n)
            return {"crow": crow, "col": col}
        rows, count = self.col.shape
        return {"col": draw_rows(rows, n // self.block, count, generator).to(self.col.dtype)}

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        support: dict[str, Tensor] = {}

        def positions(residual: Tensor) -> Tensor:
            if self.select == "residual":
                support.update(self.largest_support(fit.weighted(residual)))
            crow, col = support.get("crow", self.crow), support.get("col", self.col)
            return flat_positions(crow, col, self.block, self.in_features)

        left, right, values = low_rank_plus_sparse(weight, self.rank, fit, positions)
        root = math.sqrt(self.scale)
        return {"A.weight": right / root, "B.weight": left / root, "values": values, **support}

    def largest_support(self, scores: Tensor) -> dict[str, Tensor]:
        """`col`, and `crow` for a uniform support, of the support with the largest scores (out, in), all ≥ 0."""
        m, n = scores.shape
        if self.crow is not None:
            crow, col = compress_rows(scores.flatten().topk(self.nnz).indices.sort().values, m, n)
            return {"crow": crow, "col": col}
        b = self.block
        blocks = scores.square().view(m // b, b, n // b, b).sum((1, 3))  # (block rows, block columns)
        return {"col": blocks.topk(self.col.shape[1], dim=1).indices.sort(dim=1).values.to(self.col.dtype)}

    def factor_pair(self) -> tuple[str, str]:
        return ("B.weight", "A.weight")

    def dense_weight(self) -> Tensor:
        return compose(self.B.weight, self.A.weight, self.values, self.crow, self.col, self.block, self.scale)

    def parts(self) -> tuple[Tensor, Tensor]:
        low_rank = (self.scale * self.B.weight) @ self.A.weight
        sparse = torch.zeros_like(low_rank)
        add_sparse_(sparse, self.values, self.crow, self.col, self.block)
        return low_rank, sparse

    def singular_values(self) -> Tensor:
        return dense_singular_values(self.dense_weight())

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.rank * (self.in_features + self.out_features) + self.nnz)

    def autotune(self, tokens: int, dtype: torch.dtype, device: torch.device) -> str:
        refused = self._refused(dtype, device)
        if reason := refused.get(self.execution or ""):
            raise ConfigError(f"param.execution={self.execution} cannot run: {reason}; use param.execution=auto")
        if self.execution in EXECUTIONS:
            return self.execution
        if device.type == "cuda" and self.block > 1 and "triton" in refused:
            _say(f"param.execution=auto does not consider triton: {refused['triton']}")
        candidates = [execution for execution in EXECUTIONS if execution not in refused]
        if len(candidates) == 1:
            return candidates[0]
        shape = [self.out_features, self.in_features, self.rank, self.support, self.block, self.nnz]
        passes = {execution: _training_pass(self, execution, tokens, dtype, device) for execution in candidates}
        return fastest(["sltrain", *shape, tokens, str(dtype)], device, passes)

    def _refused(self, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
        """The executions that cannot run, and why."""
        if self.block == 1:
            found = {"triton": f"its kernels are for param.support=block, not {self.support}"}
            if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
                found["factored"] = f"without param.support=block it has no kernels for {dtype} on {device.type}"
            return found
        reason = block_products.missing(self.block, dtype, device)
        return {"triton": reason} if reason else {}

    def extra_repr(self) -> str:
        block = f" {self.block}×{self.block}" if self.block > 1 else ""
        return f"{super().extra_repr()}, support={self.support}{block}, nnz={self.nnz}"


@functools.cache
def _say(sentence: str) -> None:
    """Print a sentence, once."""
    print(sentence, flush=True)


def _check_block(block: int, out_features: int, in_features: int) -> None:
    if block < 2:
        raise ConfigError(f"param.block={block} is below 2; use param.support=row_balanced for single entries")
    if out_features % block or in_features % block:
        wrong = out_features if out_features % block else in_features
        near = -(-wrong // block) * block
        raise ConfigError(
            f"param.block={block} does not divide a layer of shape {out_features}×{in_features} (out×in); change the "
            f"model, such as {wrong} to {near} in model.config.intermediate_size, or use param.support=row_balanced"
        )


def _training_pass(
    layer: SLTrainLinear, execution: str, tokens: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """A forward and backward pass on random tensors of this layer's shapes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, layer.in_features, generator=generator).to(device, dtype).requires_grad_()
    g = torch.randn(tokens, layer.out_features, generator=generator).to(device, dtype)
    state = layer.init_parameters(generator)
    support = {k: v.to(device) for k, v in layer.draw_support(generator).items()}
    left, right, values = (state[k].to(device, dtype).requires_grad_() for k in ("B.weight", "A.weight", "values"))

    def run() -> None:
        y = sltrain_linear(
            x, left, right, values, support.get("crow"), support["col"], layer.block, layer.scale, execution
        )
        torch.autograd.grad(y, (x, left, right, values), g)

    return run
