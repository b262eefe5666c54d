"""What layers with an r-dimensional bottleneck share: activations between the factors, and DLR's foldable residual."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "none": lambda z: z}


def check_mergeable(activation: str) -> None:
    """Raises NotImplementedError where an activation between the factors leaves no matrix to merge into."""
    if activation != "none":
        raise NotImplementedError(
            f"a layer with param.activation={activation} stands for no matrix; only param.activation=none merges"
        )


def with_residual(left: Tensor, alpha: float) -> Tensor:
    """B (out, r) plus α/√K at [o, ⌊o/K⌋], K = ⌈out/r⌉, which turns B z into B z + (α/√K)·Expand_K(z).

    Expand_K repeats each of the r latents K times in a row and cuts at `out` (DLR, Wang et al., arXiv 2606.28932, which
    adds it to the outputs). Added to B it costs out·r, not tokens·out, and nothing more is kept for the backward pass.
    """
    out_features, rank = left.shape
    repeats = math.ceil(out_features / rank)
    rows = torch.arange(out_features, device=left.device)
    added = torch.full_like(left[:, 0], alpha / math.sqrt(repeats))
    return left.index_put((rows, rows // repeats), added, accumulate=True)
