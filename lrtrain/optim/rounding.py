"""Stochastic rounding to bfloat16: parameters without a float32 copy."""

from collections.abc import Sequence

import torch
from torch import Tensor


def stochastic_round(values: Tensor, seeds: Sequence[int], first_row: int = 0) -> Tensor:
    """float32 values rounded to bfloat16, up or down with the probability that makes the mean exact.

    (Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192.) Finite values within bfloat16's range stay
    finite; infinities and NaN are unchanged. The rounding of an entry is a function of (seed, its position in the
    unsharded tensor, its value).

    Args:
        values: (rows, …) of one tensor, or (tensors, rows, …) of several.
        seeds: of each tensor: 63 bits, from `integer_seed`.
        first_row: index of the first of these rows in the unsharded tensors.
    """
    bits = values.contiguous().view(torch.int32)
    rows = values.shape[0 if len(seeds) == 1 else 1]
    entries = bits.view(len(seeds), rows, -1) if bits.numel() else bits.view(len(seeds), 0, 1)
    noise = uniform_bits(entries, seeds, first_row).view(bits.shape)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def uniform_bits(like: Tensor, seeds: Sequence[int], first_row: int) -> Tensor:
    """16 random bits for each entry (tensors, rows, n), int32: a hash of (the tensor's seed, row, column)."""
    _, rows, columns = like.shape
    halves = torch.tensor([[seed & 0x7FFFFFFF, seed >> 32] for seed in seeds], dtype=torch.int32)
    low, high = halves.to(like.device, non_blocking=True).unsqueeze(-1).unbind(1)  # (tensors, 1) each
    down = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=like.device)
    across = torch.arange(columns, dtype=torch.int32, device=like.device)
    return scrambled(scrambled(low ^ down)[..., None] + (high ^ across)[:, None]).bitwise_and_(0xFFFF)


def scrambled(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer (Appleby), a bijection of int32 in which each bit affects all bits; overwrites x."""
    shifted = (x >> 16).bitwise_and_(0xFFFF)  # in place from here on: ten times as fast
    x.bitwise_xor_(shifted).mul_(-2048144789)  # 0x85ebca6b
    torch.bitwise_right_shift(x, 13, out=shifted).bitwise_and_(0x7FFFF)
    x.bitwise_xor_(shifted).mul_(-1028477387)  # 0xc2b2ae35
    torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    return x.bitwise_xor_(shifted)
