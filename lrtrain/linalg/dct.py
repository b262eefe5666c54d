"""The discrete cosine transform of rows, the basis of DCT-AdamW and Trion.

D (n, n) has the columns D[j, k] = cₖ √(2/n) cos(π(2j + 1)k / 2n), c₀ = 1/√2, else cₖ = 1: column k is the cosine of
frequency k, the first one constant, and D is orthonormal. (What Modoranu et al., arXiv 2505.17967, call Dᵀ.) D itself
is never built: by FFT both directions take O(n log n) per row.
"""

import functools
import math

import torch
from torch import Tensor


def dct(x: Tensor) -> Tensor:
    """x D (…, n): the DCT-II of each row, by one real FFT (Makhoul, IEEE Trans. ASSP 28, 1980)."""
    if not x.numel():
        return x.clone()  # which the FFT of a CPU refuses
    n = x.shape[-1]
    folded = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    turned = torch.fft.rfft(folded) * _turns(n, x.dtype, x.device)  # (…, n/2 + 1)
    return torch.cat([turned.real, -turned.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)


def inverse_dct(spectrum: Tensor) -> Tensor:
    """`spectrum` Dᵀ (…, n), the inverse of `dct`."""
    if not spectrum.numel():
        return spectrum.clone()
    n = spectrum.shape[-1]
    imaginary = torch.zeros_like(spectrum[..., : n // 2 + 1])
    imaginary[..., 1:] = -spectrum[..., (n + 1) // 2 :].flip(-1)
    turned = torch.complex(spectrum[..., : n // 2 + 1], imaginary)
    folded = torch.fft.irfft(turned / _turns(n, spectrum.dtype, spectrum.device), n)
    rows = torch.empty_like(spectrum)
    rows[..., ::2] = folded[..., : (n + 1) // 2]
    rows[..., 1::2] = folded[..., (n + 1) // 2 :].flip(-1)
    return rows


def selected(x: Tensor, columns: Tensor) -> Tensor:
    """x[:, columns] of each matrix: ([matrices,] rows, n) and ([matrices,] r) → ([matrices,] rows, r)."""
    return x[:, columns] if x.ndim == 2 else x.gather(-1, columns[:, None].expand(-1, x.shape[1], -1))


def lift(part: Tensor, columns: Tensor, n: int) -> Tensor:
    """`part` D[:, columns]ᵀ of each matrix: ([matrices,] rows, r) → ([matrices,] rows, n)."""
    spectrum = part.new_zeros(*part.shape[:-1], n)
    if part.ndim == 2:
        return inverse_dct(spectrum.index_copy_(1, columns, part))
    return inverse_dct(spectrum.scatter_(-1, columns[:, None].expand_as(part), part))


@functools.cache
def _turns(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """√(2/n) cₖ exp(−iπk / 2n) for k = 0 … n/2, from float64."""
    k = torch.arange(n // 2 + 1, dtype=torch.float64, device=device)
    turns = torch.polar(torch.full_like(k, math.sqrt(2 / n)), k * (-math.pi / (2 * n)))
    turns[0] = math.sqrt(1 / n)
    return turns.to(dtype.to_complex())
