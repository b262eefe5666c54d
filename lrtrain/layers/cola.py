"""CoLA: y = B σ(A x), an activation between the factors.

Liu et al., "CoLA: Compute-Efficient Pre-Training of LLMs via Low-Rank Activation", EMNLP 2025, arXiv 2502.10940. With
`residual` it is DLR (Wang et al., arXiv 2606.28932): y = B z + (α/√K)·Expand_K(z), z = σ(A x), which folds into B.
"""

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from lrtrain.layers.bottleneck import ACTIVATIONS, Activation, check_mergeable
from lrtrain.layers.lowrank import Init, LowRankLinear


class CoLALinear(LowRankLinear):
    """y = B σ(A x) + bias with A (rank, in) and B (out, rank).

    Args:
        init, init_std: see `LowRankLinear`; `cola` is CoLA's.
        activation: σ, `silu` or `none`.
        residual, residual_alpha: DLR's residual; see `with_residual`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        rank: int,
        init: Init,
        init_std: PositiveFloat,
        activation: Activation,
        residual: bool,
        residual_alpha: NonNegativeFloat,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, bias, rank, init, init_std, residual, residual_alpha, None, device)
        self.activation = activation

    def expand(self, z: Tensor, first: int = 0) -> Tensor:
        return super().expand(ACTIVATIONS[self.activation](z), first)

    def factor_pair(self) -> tuple[str, str] | None:
        return super().factor_pair() if self.activation == "none" else None

    def dense_weight(self) -> Tensor:
        check_mergeable(self.activation)
        return super().dense_weight()
