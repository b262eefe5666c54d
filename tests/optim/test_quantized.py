"""Eight-bit codes: the published grid, the nearest value, and no surprises at the edges."""

import math

import pytest
import torch

from lrtrain.optim.quantized import BLOCK, block_maxima, dequantize, dynamic_map, quantize


@pytest.mark.parametrize("signed", [True, False])
def test_the_grid_has_seven_decades_each_twice_as_fine_as_the_one_below(signed: bool):
    values = dynamic_map(signed).tolist()
    assert values == sorted(values) and len(set(values)) == 256 and values[-1] == 1.0 and 0.0 in values
    for i in range(7):
        decade = [v for v in values if 10.0 ** (i - 7) < v < 10.0 ** (i - 6)]
        count = 2 ** (i + (not signed))
        step = 0.9 * 10.0 ** (i - 6) / count
        assert decade == pytest.approx([10.0 ** (i - 7) + (k + 0.5) * step for k in range(count)], rel=1e-6)
        negative = [-v for v in values if -(10.0 ** (i - 6)) < v < -(10.0 ** (i - 7))]
        assert negative[::-1] == (decade if signed else [])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [256, 1000, 7])
def test_each_entry_goes_to_the_nearest_value(signed: bool, n: int):
    x = torch.randn(5, n, generator=torch.Generator().manual_seed(0)) ** 3
    x = x if signed else x.abs()
    scales = block_maxima(x)
    found = dequantize(quantize(x, scales, signed), scales, signed)
    values = dynamic_map(signed).double()
    for row in range(5):
        for block in range(math.ceil(n / BLOCK)):
            entries = x[row, block * BLOCK : (block + 1) * BLOCK].double()
            assert scales[row, block] == entries.abs().max()
            nearest = (entries[:, None] / scales[row, block] - values).abs().min(1).values
            error = (
                found[row, block * BLOCK : (block + 1) * BLOCK] / scales[row, block] - entries / scales[row, block]
            ).abs()
            assert (error <= nearest + 2**-12).all()  # of the unit that a block's largest entry is


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_stands_for_its_value_and_comes_back(signed: bool):
    codes = torch.arange(256, dtype=torch.uint8)[None]
    one = torch.ones(1, 1)
    values = dequantize(codes, one, signed)
    assert torch.equal(values.sort().values[0], dynamic_map(signed))
    assert torch.equal(quantize(values, one, signed), codes)


def test_zeros_stay_zero_and_have_code_zero():
    x = torch.zeros(3, 300)
    scales = block_maxima(x)
    for signed in (True, False):
        codes = quantize(x, scales, signed)
        assert not codes.any() and not dequantize(codes, scales, signed).any()
