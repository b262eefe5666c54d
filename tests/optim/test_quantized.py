"""Eight-bit codes: the published grid, the nearest value, and no surprises at the edges."""

import math
import warnings

import pytest
import torch

from lrtrain.optim.quantized import BLOCK, block_maxima, dequantize, dynamic_map, quantize


@pytest.mark.parametrize("signed", [True, False])
def test_the_grid_is_torchaos(signed: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.optim.quant_utils import create_dynamic_map

    assert dynamic_map(signed).tolist() == pytest.approx(create_dynamic_map(signed), rel=1e-6)
    assert len(set(dynamic_map(signed).tolist())) == 256


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
