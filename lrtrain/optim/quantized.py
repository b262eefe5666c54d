"""8-bit quantization of moments: blocks of 256 entries with one scale each, and codes on a logarithmic grid.

Dettmers et al., "8-bit optimizers via block-wise quantization", ICLR 2022, arXiv 2110.02861: the dynamic map.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
DROPPED = 12  # lower bits of a float32 that are ignored for its code
TINY = 1e-30


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of codes, between −1 (or 0) and 1, ascending: seven decades, each with twice as many values as
    the one below, evenly spaced in [0.1, 1]·10^(i−6), and zero and one."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        middle = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += middle.tolist() + ([-v for v in middle.tolist()] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float64).float()


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two tables: value by code, and code by the upper bits of a float32. Code 0 is the value zero.

    The second table finds the nearest value by one lookup, three times as fast as a binary search. Numbers with equal
    upper bits get the same code, so those within a relative 2⁻¹² of the middle of two values may get either.
    """
    values = dynamic_map(signed)
    zero = int((values == 0).nonzero())
    middles = (values[:-1] + values[1:]) / 2
    cells = torch.arange(2 ** (32 - DROPPED), dtype=torch.int64) * 2**DROPPED + 2 ** (DROPPED - 1)
    centers = torch.where(cells < 2**31, cells, cells - 2**32).int().view(torch.float32)
    codes = (torch.bucketize(centers.nan_to_num(), middles) - zero).to(torch.uint8)  # modulo 256
    return values.roll(-zero).to(device), codes.to(device)


def blocks_of(n: int) -> int:
    """The number of blocks of n entries."""
    return -(-n // BLOCK)


def block_maxima(x: Tensor) -> Tensor:
    """The largest magnitude in each block of each row: (rows, n) → (rows, ⌈n/256⌉)."""
    return _blocked(x).abs().amax(-1)


def quantize(x: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The codes nearest to x/scale: x (rows, n), scales (rows, ⌈n/256⌉) → uint8 (rows, n)."""
    _, codes = _tables(signed, x.device)
    unit = _blocked(x) / scales.clamp_min(TINY).unsqueeze(-1)
    cells = unit.view(torch.int32).bitwise_right_shift_(DROPPED).bitwise_and_(2 ** (32 - DROPPED) - 1)
    return codes.index_select(0, cells.view(-1)).view(len(x), -1)[:, : x.shape[1]]


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The values of codes (rows, n) with scales (rows, ⌈n/256⌉), float32."""
    values, _ = _tables(signed, codes.device)
    found = values.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    whole = codes.shape[1] // BLOCK * BLOCK
    found[:, :whole].unflatten(1, (-1, BLOCK)).mul_(scales[:, : whole // BLOCK].unsqueeze(-1))
    found[:, whole:].mul_(scales[:, whole // BLOCK :])
    return found


def _blocked(x: Tensor) -> Tensor:
    """(rows, n) → (rows, blocks, 256), filled up with zeros."""
    return F.pad(x, (0, -x.shape[1] % BLOCK)).view(len(x), blocks_of(x.shape[1]), BLOCK)
