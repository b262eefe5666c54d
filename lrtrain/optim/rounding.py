"""Stochastic rounding to bfloat16: parameters without a float32 copy."""

import torch
from torch import Tensor


def stochastic_round(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values → bfloat16, up or down to a neighbor with the probability that makes the mean exact.

    (Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192.) Finite values stay finite but for those beyond
    bfloat16's range; infinities and NaN stay what they are.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(2**16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()
