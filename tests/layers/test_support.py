"""Sparse supports: exact counts, uniform, reproducible, and products that agree with the dense matrix."""

import pytest
import torch

from lrtrain.layers.support import (
    compress_rows,
    draw_uniform,
    flat_positions,
    sampled_product,
    sparse_apply,
    sparse_apply_transposed,
)


@pytest.mark.parametrize("total,count", [(1000, 0), (1000, 1), (1000, 30), (1000, 500), (1000, 970), (1000, 1000)])
def test_draw_has_exactly_count_distinct_ascending_members(total: int, count: int):
    picked = draw_uniform(total, count, torch.Generator().manual_seed(0))
    assert len(picked) == count
    assert (picked.diff() > 0).all() and (count == 0 or 0 <= picked[0] <= picked[-1] < total)


@pytest.mark.parametrize("count", [6, 18])
def test_every_member_is_equally_likely(count: int):
    generator = torch.Generator().manual_seed(0)
    draws, total = 4000, 24
    hits = torch.zeros(total)
    for _ in range(draws):
        hits[draw_uniform(total, count, generator)] += 1
    expected = draws * count / total
    chi2 = ((hits - expected).square() / (expected * (1 - count / total))).sum() * (total - 1) / total
    assert chi2 < 50  # 23 degrees of freedom: exceeded once in a thousand


def test_compressed_rows_give_the_positions_back():
    flat = draw_uniform(7 * 11, 20, torch.Generator().manual_seed(0))
    crow, col = compress_rows(flat, 7, 11)
    assert crow.dtype == col.dtype == torch.int32
    assert torch.equal(flat_positions(crow, col, 11), flat)


def test_products_agree_with_the_dense_matrix():
    m, n = 7, 11
    flat = draw_uniform(m * n, 20, torch.Generator().manual_seed(0))
    crow, col = compress_rows(flat, m, n)
    values = torch.randn(20, dtype=torch.float64)
    dense = torch.zeros(m * n, dtype=torch.float64).index_put((flat,), values).view(m, n)
    x, g = torch.randn(5, n, dtype=torch.float64), torch.randn(5, m, dtype=torch.float64)
    torch.testing.assert_close(sparse_apply(values, crow, col, x), x @ dense.T)
    torch.testing.assert_close(sparse_apply_transposed(values, crow, col, g, n), g @ dense)
    torch.testing.assert_close(sampled_product(crow, col, g, x), (g.T @ x).flatten()[flat])


def test_operators_pass_torchs_own_checks():
    crow, col = compress_rows(draw_uniform(24, 9, torch.Generator().manual_seed(0)), 4, 6)
    values, x, g = torch.randn(9), torch.randn(5, 6), torch.randn(5, 4)
    torch.library.opcheck(sparse_apply, (values, crow, col, x))
    torch.library.opcheck(sparse_apply_transposed, (values, crow, col, g, 6))
    torch.library.opcheck(sampled_product, (crow, col, g, x))
