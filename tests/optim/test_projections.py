"""Bases: what they span, that parts of a gradient find the same one, and what random ones do to norms."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import SHAPES, gradients, in_parts

from lrtrain.optim.projections import gaussian_basis, randomized_basis, sparse_basis, svd_basis


def alone(partial: Tensor) -> Tensor:
    return partial


def svd(gradient: Tensor, rank: int, total=alone) -> Tensor:
    return svd_basis(gradient, rank, total)


def randomized(gradient: Tensor, rank: int, total=alone) -> Tensor:
    return randomized_basis(gradient, rank, torch.Generator().manual_seed(5), total)


def share_kept(gradient: Tensor, p: Tensor) -> float:
    return float((gradient @ p).square().sum() / gradient.square().sum())


FOUND = pytest.mark.parametrize("basis", [svd, randomized])


@FOUND
@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_directions_as_the_smaller_side_keep_the_gradient(basis, shape: tuple[int, int]):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = basis(gradient, min(shape))
    torch.testing.assert_close(gradient @ p @ p.T, gradient, atol=1e-5, rtol=0)
    torch.testing.assert_close(p.T @ p, torch.eye(min(shape)), atol=1e-5, rtol=0)
    assert share_kept(gradient, p) == pytest.approx(1, abs=1e-5)


@FOUND
@pytest.mark.parametrize("shape", SHAPES)
def test_they_span_the_leading_singular_vectors_where_gaps_are_clear(basis, shape: tuple[int, int]):
    gradient = gradients(*shape, 1)[0]
    v = torch.from_numpy(np.linalg.svd(gradient.numpy())[2][:5].T.copy())
    p = basis(gradient.float(), 5).double()
    torch.testing.assert_close(p @ p.T, v @ v.T, atol=1e-3, rtol=0)
    torch.testing.assert_close((p.T @ v).abs(), torch.eye(5, dtype=torch.float64), atol=1e-3, rtol=0)  # and in order
    assert (p.gather(0, p.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_the_randomized_basis_keeps_as_much_energy_as_the_exact_one(shape: tuple[int, int]):
    """Within 1 %, of singular values that fall as 1/√j, which leaves most of them close to their neighbors."""
    dice = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(side, 120, generator=dice)).Q for side in shape)
    gradient = (u / torch.arange(1, 121).sqrt()) @ v.T
    best = share_kept(gradient, svd(gradient, 30))
    exact = sum(1 / j for j in range(1, 31)) / sum(1 / j for j in range(1, 121))
    assert best == pytest.approx(exact, rel=1e-4)
    assert best * 0.99 < share_kept(gradient, randomized(gradient, 30)) < best


@FOUND
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_in_parts_find_the_basis_of_the_whole(basis, shape: tuple[int, int]):
    """Three parts of uneven lengths, one without rows."""
    gradient = gradients(*shape, 1)[0].float()
    first = shape[0] // 3
    parts = in_parts(lambda rows, total: basis(rows, 4, total), gradient, [first, shape[0] - first, 0])
    for part in parts:
        torch.testing.assert_close(part, basis(gradient, 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("basis", [gaussian_basis, sparse_basis])
@pytest.mark.parametrize("rank", [1, 6])
def test_random_bases_are_the_identity_on_average(basis, rank: int):
    many = torch.stack([basis(10, rank, seed) for seed in range(4000)])
    mean = (many @ many.mT).mean(0)
    torch.testing.assert_close(mean, torch.eye(10), atol=0.15, rtol=0)
    assert torch.equal(basis(10, rank, 3), many[3]) and not torch.equal(many[3], many[4])


@pytest.mark.parametrize("basis", [gaussian_basis, sparse_basis])
def test_random_bases_keep_the_norms_of_dense_rows(basis):
    rows = torch.randn(400, 1024, generator=torch.Generator().manual_seed(0))
    ratios = (rows @ basis(1024, 128, 1)).norm(dim=1) / rows.norm(dim=1)
    assert float(ratios.mean()) == pytest.approx(1, abs=0.02)
    assert float(ratios.std()) == pytest.approx(1 / math.sqrt(2 * 128), rel=0.25)


def test_a_sparse_basis_has_one_entry_in_root_n():
    entries = sparse_basis(1024, 128, 1)
    assert float((entries != 0).float().mean()) == pytest.approx(1 / 32, rel=0.05)
    assert entries.unique().tolist() == pytest.approx([-0.5, 0, 0.5])  # √(32 / 128)
