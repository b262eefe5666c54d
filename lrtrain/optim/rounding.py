"""Stochastic rounding to bfloat16: parameters without a float32 copy."""

import torch
from torch import Tensor


def stochastic_round(values: Tensor, seed: int, first_row: int = 0) -> Tensor:
    """float32 values (rows, …) rounded to bfloat16, up or down with the probability that makes the mean exact.

    (Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192.) Finite values within bfloat16's range stay
    finite; infinities and NaN are unchanged. The rounding of an entry is a function of (seed, its position in the
    unsharded tensor, its value).

    Args:
        seed: 63 bits, from `integer_seed`.
        first_row: index of the first of these rows in the unsharded tensor.
    """
    bits = values.contiguous().view(torch.int32)
    noise = uniform_bits(bits.view(len(bits), -1) if len(bits) else bits.view(0, 1), seed, first_row).view(bits.shape)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def uniform_bits(like: Tensor, seed: int, first_row: int) -> Tensor:
    """16 random bits for each entry of rows (rows, n), int32: a hash of (seed, row, column)."""
    rows, columns = like.shape
    low, high = seed & 0x7FFFFFFF, seed >> 32
    down = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=like.device)
    across = torch.arange(columns, dtype=torch.int32, device=like.device)
    return scrambled(scrambled(down ^ low)[:, None] + (across ^ high)).bitwise_and_(0xFFFF)


def scrambled(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer (Appleby), a bijection of int32 in which each bit affects all bits; overwrites x."""
    shifted = (x >> 16).bitwise_and_(0xFFFF)  # in place from here on: ten times as fast
    x.bitwise_xor_(shifted).mul_(-2048144789)  # 0x85ebca6b
    torch.bitwise_right_shift(x, 13, out=shifted).bitwise_and_(0x7FFFF)
    x.bitwise_xor_(shifted).mul_(-1028477387)  # 0xc2b2ae35
    torch.bitwise_right_shift(x, 16, out=shifted).bitwise_and_(0xFFFF)
    return x.bitwise_xor_(shifted)
