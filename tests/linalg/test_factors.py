"""Spectra computed from factors or Grams equal the SVD of the full matrix in float64."""

import math

import pytest
import torch

from lrtrain.linalg.factors import dense_singular_values, product_singular_values

SHAPES = [  # out, in, rank
    pytest.param(24, 24, 8, id="square"),
    pytest.param(64, 16, 8, id="tall"),
    pytest.param(16, 64, 8, id="wide"),
    pytest.param(32, 20, 1, id="rank-1"),
    pytest.param(32, 20, 20, id="full-rank"),
    pytest.param(1, 20, 1, id="one-row"),
]


def random_factors(out: int, inner: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(out * inner + rank)
    left = torch.randn(out, rank, dtype=torch.float64, generator=generator)
    right = torch.randn(rank, inner, dtype=torch.float64, generator=generator)
    return left, right


def assert_equals_svd(sigma: torch.Tensor, weight: torch.Tensor, atol: float = 1e-10):
    exact = torch.linalg.svdvals(weight.double())[: len(sigma)]
    torch.testing.assert_close(sigma, exact, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("out, inner, rank", SHAPES)
def test_factors_give_the_spectrum_of_their_product(out: int, inner: int, rank: int):
    left, right = random_factors(out, inner, rank)
    sigma = product_singular_values(left, right, scale=0.25)
    assert sigma.shape == (rank,)
    assert_equals_svd(sigma, 0.25 * left @ right)


def test_a_worked_example():
    left = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 2.0]])
    right = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    sigma = product_singular_values(left, right, scale=1.0)
    assert sigma.tolist() == pytest.approx([math.sqrt(21), math.sqrt(3)], abs=1e-12)


def test_a_negative_scale_gives_no_negative_singular_values():
    left, right = random_factors(8, 8, 4)
    torch.testing.assert_close(
        product_singular_values(left, right, scale=-2.0), product_singular_values(left, right, scale=2.0)
    )


def test_a_zero_factor_gives_zeros():
    left, right = random_factors(16, 24, 4)
    assert product_singular_values(torch.zeros_like(left), right, scale=1.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("deficient", ["left", "right"])
def test_dependent_columns_give_exact_zeros_in_the_tail(deficient: str):
    left, right = random_factors(40, 30, 8)
    if deficient == "left":
        left[:, 5:] = left[:, :3]
    else:
        right[5:] = right[:3]
    sigma = product_singular_values(left, right, scale=1.0)
    assert_equals_svd(sigma, left @ right, atol=1e-12)
    assert sigma[5:].max() < 1e-12


def test_ill_conditioned_factors_keep_their_smallest_values():
    left, right = random_factors(60, 50, 8)
    decay = torch.logspace(0, -6, 8, dtype=torch.float64)
    left = torch.linalg.qr(left).Q * decay
    right = decay[:, None] * torch.linalg.qr(right.T).Q.T
    sigma = product_singular_values(left, right, scale=1.0)
    torch.testing.assert_close(sigma, decay**2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("out, inner, rank", SHAPES)
def test_the_gram_gives_the_spectrum_of_a_dense_weight(out: int, inner: int, rank: int):
    weight = random_factors(out, inner, rank)[0].float()  # (out, rank): tall, wide and one row
    for matrix in (weight, weight.T):
        sigma = dense_singular_values(matrix)
        assert sigma.shape == (min(out, rank),)
        assert_equals_svd(sigma, matrix)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_give_nan(bad: float):
    left, right = random_factors(8, 8, 4)
    left[0, 0] = bad
    assert product_singular_values(left, right, scale=1.0).isnan().all()
    assert dense_singular_values(left).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_weights_are_measured_in_float64(dtype: torch.dtype):
    left, right = (factor.to(dtype) for factor in random_factors(48, 32, 8))
    sigma = product_singular_values(left, right, scale=1.0)
    assert sigma.dtype == torch.float64
    assert_equals_svd(sigma, left.double() @ right.double())
