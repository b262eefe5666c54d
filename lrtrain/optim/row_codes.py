"""Rows as codes of a few bits between their least and largest entry: what error feedback is kept in."""

import torch
from torch import Tensor


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, n) → codes (rows, n) uint8, the least entry (rows,) and the gap between levels (rows,).

    All 2^bits levels are used; each entry goes to the nearest, which is at most half a gap away. A constant row, with a
    gap of zero, has codes of zero.
    """
    low, high = x.aminmax(dim=1)
    gap = (high - low) / (2**bits - 1)
    codes = (x - low[:, None]).div_(gap.clamp_min(torch.finfo(x.dtype).tiny)[:, None]).round_()
    return codes.clamp_(max=2**bits - 1).to(torch.uint8), low, gap


def decode(codes: Tensor, low: Tensor, gap: Tensor) -> Tensor:
    """The values (rows, n) that codes stand for."""
    return torch.addcmul(low[:, None], codes.to(gap.dtype), gap[:, None])


def pack(codes: Tensor) -> Tensor:
    """Codes below 16 (rows, n) → two in a byte (rows, ⌈n/2⌉): entry 2k in the lower half of byte k, 2k + 1 above."""
    packed = codes[:, ::2].clone()
    packed[:, : codes.shape[1] // 2] |= codes[:, 1::2] << 4
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The codes (rows, n) of `pack`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :n]
