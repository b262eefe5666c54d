"""The discrete cosine transform of rows, the basis of DCT-AdamW and Trion.

D (n, n) has the columns D[j, k] = cₖ √(2/n) cos(π(2j + 1)k / 2n), c₀ = 1/√2, else cₖ = 1: column k is the cosine of
frequency k, the first one constant, and D is orthonormal. (What Modoranu et al., arXiv 2505.17967, call Dᵀ.) D itself
is never built: by FFT both directions take O(n log n) per row.
"""

import math

import torch
from torch import Tensor


def dct(x: Tensor) -> Tensor:
    """x D (rows, n): the DCT-II of each row, by one real FFT (Makhoul, IEEE Trans. ASSP 28, 1980)."""
    if not len(x):
        return x.clone()  # which the FFT of a CPU refuses
    n = x.shape[1]
    folded = torch.cat([x[:, ::2], x[:, 1::2].flip(1)], 1)
    turned = torch.fft.rfft(folded) * _turns(x)  # (rows, n/2 + 1)
    return torch.cat([turned.real, -turned.imag[:, 1 : (n + 1) // 2].flip(1)], 1)


def inverse_dct(spectrum: Tensor) -> Tensor:
    """`spectrum` Dᵀ (rows, n), the inverse of `dct`."""
    if not len(spectrum):
        return spectrum.clone()
    n = spectrum.shape[1]
    imaginary = torch.zeros_like(spectrum[:, : n // 2 + 1])
    imaginary[:, 1:] = -spectrum[:, (n + 1) // 2 :].flip(1)
    turned = torch.complex(spectrum[:, : n // 2 + 1], imaginary)
    folded = torch.fft.irfft(turned / _turns(spectrum), n)
    rows = torch.empty_like(spectrum)
    rows[:, ::2] = folded[:, : (n + 1) // 2]
    rows[:, 1::2] = folded[:, (n + 1) // 2 :].flip(1)
    return rows


def lift(part: Tensor, columns: Tensor, n: int) -> Tensor:
    """`part` D[:, columns]ᵀ: (rows, r) → (rows, n)."""
    return inverse_dct(part.new_zeros(len(part), n).index_copy_(1, columns, part))


def _turns(like: Tensor) -> Tensor:
    """√(2/n) cₖ exp(−iπk / 2n) for k = 0 … n/2, from float64."""
    n = like.shape[1]
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device=like.device)
    turns = torch.polar(torch.full_like(k, math.sqrt(2 / n)), k * (-math.pi / (2 * n)))
    turns[0] = math.sqrt(1 / n)
    return turns.to(like.dtype.to_complex())
