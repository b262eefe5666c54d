"""The cosine transform against its matrix in float64, and what is done with columns of it."""

import math

import pytest
import torch
from torch import Tensor
from toy import in_parts

from lrtrain.errors import ConfigError
from lrtrain.linalg.dct import dct, inverse_dct, lift
from lrtrain.model.rank import matrix_rank
from lrtrain.optim.dct_adamw import transport
from lrtrain.optim.dct_columns import top_columns

SIZES = [1, 2, 7, 8, 61, 512]


def dct_matrix(n: int) -> Tensor:
    """D[j, k] = cₖ √(2/n) cos(π(2j + 1)k / 2n); the angle modulo 2π in whole numbers."""
    j = torch.arange(n)
    turns = torch.outer(2 * j + 1, j) % (4 * n)
    basis = (turns.double() * (math.pi / (2 * n))).cos() * math.sqrt(2 / n)
    basis[:, 0] = math.sqrt(1 / n)
    return basis


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_is_orthonormal_and_the_fft_is_the_product_with_it(n: int):
    basis = dct_matrix(n)
    torch.testing.assert_close(basis @ basis.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(dct(x), x @ basis, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_dct(x), x @ basis.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(dct(x.float()).double(), x @ basis, rtol=0, atol=2e-6)
    assert dct(x.float()).dtype == torch.float32 and dct(x[:0]).shape == inverse_dct(x[:0]).shape == (0, n)


def test_lifted_columns_are_the_product_with_those_of_the_matrix():
    columns = torch.tensor([0, 3, 4, 12])
    part = torch.randn(6, 4, dtype=torch.float64)
    torch.testing.assert_close(lift(part, columns, 13), part @ dct_matrix(13)[:, columns].T, rtol=0, atol=1e-12)
    torch.testing.assert_close(dct(lift(part, columns, 13))[:, columns], part, rtol=0, atol=1e-12)


def test_the_largest_columns_ascend_and_ties_go_to_the_first():
    assert top_columns(torch.tensor([1.0, 5.0, 3.0, 5.0, 3.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert top_columns(torch.zeros(1000), 10).tolist() == [*range(10)]


def test_moments_that_go_with_their_columns_are_rotated():
    """The same as M D[:, old]ᵀ D[:, new], which is a matrix of zeros and ones."""
    dice = torch.Generator().manual_seed(0)
    basis = dct_matrix(20)
    for _ in range(20):
        old, new = (torch.randperm(20, generator=dice)[:8].sort().values for _ in range(2))
        moment = torch.rand(5, 8, generator=dice, dtype=torch.float64)
        expected = moment @ basis[:, old].T @ basis[:, new]
        torch.testing.assert_close(transport([moment], old, new)[0], expected, rtol=0, atol=1e-12)
        kept = transport([moment], old, new)[0] != 0
        assert kept.all(0).tolist() == [int(k) in old.tolist() for k in new]


def test_sums_over_row_parts_choose_the_columns_of_the_whole():
    g = torch.randn(30, 16)

    def chosen(part: Tensor, total) -> Tensor:
        return top_columns(total(dct(part).abs().sum(0)), 5)

    for found in in_parts(chosen, g, [11, 19, 0]):
        assert torch.equal(found, top_columns((g.double() @ dct_matrix(16)).abs().sum(0), 5))


def test_ranks_are_shares_or_numbers_up_to_the_smaller_side():
    def rank(rule: int | float, m: int, n: int) -> int:
        return matrix_rank(rule, "optim.rank", "some.weight", m, n)

    assert rank(0.25, 64, 10) == 2 and rank(1.0, 8, 10) == 8
    assert rank(8, 8, 10) == 8 and rank(0.01, 8, 10) == 1
    with pytest.raises(ConfigError, match=r"optim.rank=9 is not between 1 and min\(in, out\)=8 of some.weight"):
        rank(9, 8, 10)
    for wrong in (0, 1.5, 0.0, -0.5):
        with pytest.raises(ConfigError, match="optim.rank="):
            rank(wrong, 8, 10)
