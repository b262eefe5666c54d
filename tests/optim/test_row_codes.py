"""Codes of rows at their edges."""

import pytest
import torch

from lrtrain.optim.row_codes import decode, encode, pack, unpack


@pytest.mark.parametrize("bits", [4, 8])
def test_all_levels_are_used_and_no_entry_is_further_than_half_a_gap(bits: int):
    levels = 2**bits
    x = torch.linspace(-3, 5, 4 * levels).repeat(2, 1) * torch.tensor([[1.0], [1e-9]])
    codes, low, gap = encode(x, bits)
    assert codes.dtype == torch.uint8 and [row.unique().tolist() for row in codes] == [[*range(levels)]] * 2
    torch.testing.assert_close(gap, torch.tensor([8.0, 8e-9]) / (levels - 1))
    error = (decode(codes, low, gap) - x).abs()
    assert (error <= gap[:, None] * 0.5001).all()
    assert (error > gap[:, None] * 0.4).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_constant_rows_and_levels_themselves_come_back(bits: int):
    x = torch.tensor([[0.0] * 6, [3.3] * 6, [-2.0] * 6])
    assert torch.equal(decode(*encode(x, bits)), x)
    grid = torch.arange(2.0**bits)[None]
    assert torch.equal(decode(*encode(grid, bits)), grid)
    assert decode(*encode(x[:0], bits)).shape == (0, 6)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_packing_two_codes_in_a_byte_loses_none(n: int):
    codes = torch.randint(16, (9, n), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (9, -(-n // 2)) and torch.equal(unpack(packed, n), codes)
