"""Quantization of rows to a few bits between their smallest and largest entry, for error feedback."""

import torch
from torch import Tensor


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, n) → codes (…, n) uint8, the smallest entry (…) and the gap between levels (…).

    Each entry is rounded to the nearest of 2^bits levels, at most half a gap away. A constant row has gap and codes of
    zero.
    """
    low, high = x.aminmax(dim=-1)
    gap = (high - low) / (2**bits - 1)
    codes = (x - low[..., None]).div_(gap.clamp_min(torch.finfo(x.dtype).tiny)[..., None]).round_()
    return codes.clamp_(max=2**bits - 1).to(torch.uint8), low, gap


def decode(codes: Tensor, low: Tensor, gap: Tensor) -> Tensor:
    """The values (…, n) of codes."""
    return torch.addcmul(low[..., None], codes.to(gap.dtype), gap[..., None])


def pack(codes: Tensor) -> Tensor:
    """Codes below 16 (…, n) → two per byte (…, ⌈n/2⌉): entry 2k in the lower half of byte k, 2k + 1 in the
    upper."""
    packed = codes[..., ::2].clone()
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack`: codes (…, n)."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :n]
