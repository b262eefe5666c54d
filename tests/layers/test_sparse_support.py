"""Sparse supports: exact counts, uniform, reproducible, and products that agree with the dense matrix."""

import pytest
import torch
from torch import Tensor

from lrtrain.layers import sparse_support as support
from lrtrain.layers.sparse_support import (
    block_add_,
    block_add_transposed_,
    block_sampled,
    column_dtype,
    compress_rows,
    draw_rows,
    draw_uniform,
    flat_positions,
    sparse_apply,
    sparse_gradients,
)


@pytest.mark.parametrize("total,count", [(1000, 0), (1000, 1), (1000, 30), (1000, 500), (1000, 970), (1000, 1000)])
def test_draw_has_exactly_count_distinct_ascending_members(total: int, count: int):
    picked = draw_uniform(total, count, torch.Generator().manual_seed(0))
    assert len(picked) == count
    assert (picked.diff() > 0).all() and (count == 0 or 0 <= picked[0] <= picked[-1] < total)


@pytest.mark.parametrize("total,count", [(50, 0), (50, 1), (50, 5), (50, 25), (50, 48), (50, 50), (1, 1)])
def test_draw_has_exactly_count_distinct_ascending_members_in_each_row(total: int, count: int):
    picked = draw_rows(40, total, count, torch.Generator().manual_seed(0))
    assert picked.shape == (40, count)
    assert (picked.diff(dim=1) > 0).all() and (count == 0 or (0 <= picked).all() and (picked < total).all())


def uneven(draw, total: int, count: int) -> float:
    """χ² of how often each of 0..total-1 is drawn against equal chances, for 4,000 draws of `count` of them."""
    hits = torch.bincount(draw.flatten(), minlength=total)
    expected = 4000 * count / total
    return float(((hits - expected).square() / (expected * (1 - count / total))).sum() * (total - 1) / total)


# 23 degrees of freedom: 50 is exceeded once in a thousand
@pytest.mark.parametrize("count", [6, 18])
def test_every_member_is_equally_likely(count: int):
    generator = torch.Generator().manual_seed(0)
    assert uneven(torch.stack([draw_uniform(24, count, generator) for _ in range(4000)]), 24, count) < 50
    assert uneven(draw_rows(4000, 24, count, generator), 24, count) < 50


def test_every_pair_is_equally_likely_in_a_row():
    picked = draw_rows(4000, 7, 2, torch.Generator().manual_seed(0))
    hits = torch.bincount(picked[:, 0] * 7 + picked[:, 1], minlength=49)[torch.ones(7, 7).triu(1).flatten().bool()]
    assert len(hits) == 21
    assert ((hits - 4000 / 21).square() / (4000 / 21)).sum() < 45.3  # 20 degrees of freedom, once in a thousand


def test_columns_take_two_bytes_where_they_can():
    assert column_dtype(2**16).itemsize == 2 and column_dtype(2**16 + 1).itemsize == 4
    far = torch.tensor([2**16 - 1])
    assert torch.equal(far.to(column_dtype(2**16)).long(), far)


def test_compressed_rows_give_the_positions_back():
    flat = draw_uniform(7 * 11, 20, torch.Generator().manual_seed(0))
    crow, col = compress_rows(flat, 7, 11)
    assert torch.equal(flat_positions(crow, col, 1, 11), flat)


def test_positions_of_balanced_supports():
    col = torch.tensor([[0, 2], [1, 2]])
    assert flat_positions(None, col, 1, 3).tolist() == [0, 2, 4, 5]
    rows = [[0, 1, 4, 5], [6, 7, 10, 11], [14, 15, 16, 17], [20, 21, 22, 23]]  # of 4×6, in blocks of 2×2
    assert flat_positions(None, col, 2, 6).view(4, 4).tolist() == rows


def drawn(kind: str, m: int, n: int) -> tuple[Tensor | None, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    if kind == "uniform":
        return *compress_rows(draw_uniform(m * n, 20, generator), m, n), 1
    block = 3 if kind == "block" else 1
    return None, draw_rows(m // block, n // block, 2, generator).to(torch.uint16), block


def composed(values: Tensor, crow: Tensor | None, col: Tensor, block: int, m: int, n: int) -> Tensor:
    return values.new_zeros(m * n).index_put((flat_positions(crow, col, block, n),), values).view(m, n)


@pytest.mark.parametrize("tile", [2, 5, 512])  # of 5 tokens: with a rest, all, more than there are
@pytest.mark.parametrize("kind", ["uniform", "row_balanced"])
@pytest.mark.parametrize("m,n", [(6, 12), (12, 6)])
def test_sparse_products_agree_with_the_dense_matrix(kind: str, m: int, n: int, tile: int, monkeypatch):
    monkeypatch.setattr(support, "TILE", tile)
    crow, col, block = drawn(kind, m, n)
    positions = flat_positions(crow, col, block, n)
    values = torch.randn(len(positions), dtype=torch.float64)
    dense = composed(values, crow, col, block, m, n)
    x, g = torch.randn(5, n, dtype=torch.float64), torch.randn(5, m, dtype=torch.float64)
    torch.testing.assert_close(sparse_apply(values, crow, col, x), x @ dense.T)
    dx, d_values = sparse_gradients(values, crow, col, g, x)
    torch.testing.assert_close(dx, g @ dense)
    torch.testing.assert_close(d_values, (g.T @ x).flatten()[positions])


@pytest.mark.parametrize("m,n", [(6, 12), (12, 6)])
def test_block_products_agree_with_the_dense_matrix(m: int, n: int):
    crow, col, block = drawn("block", m, n)
    positions = flat_positions(crow, col, block, n)
    values = torch.randn(len(positions), dtype=torch.float64)
    dense = composed(values, crow, col, block, m, n)
    x, g = torch.randn(5, n, dtype=torch.float64), torch.randn(5, m, dtype=torch.float64)
    torch.testing.assert_close(block_add_(g.clone(), values, col, block, x), g + x @ dense.T)
    torch.testing.assert_close(block_add_transposed_(x.clone(), values, col, block, g), x + g @ dense)
    torch.testing.assert_close(block_sampled(g, x, col, block), (g.T @ x).flatten()[positions])


@pytest.mark.parametrize("kind", ["uniform", "row_balanced"])
def test_operators_pass_torchs_own_checks(kind: str):
    crow, col, _ = drawn(kind, 6, 12)
    values, x, g = torch.randn(col.numel()), torch.randn(5, 12), torch.randn(5, 6)
    torch.library.opcheck(sparse_apply, (values, crow, col, x))
    torch.library.opcheck(sparse_gradients, (values, crow, col, g, x))
