"""The parts of W = L + S against a worked example, and what an untrained layer shows."""

import pytest
import torch

from lrtrain.spectra.parts import contributions, energy_in_columns, head_share, tail_share
from lrtrain.spectra.subspaces import orthonormal_basis


def worked_example() -> tuple[torch.Tensor, torch.Tensor]:
    low_rank = torch.tensor([[2.0], [0], [0]]) @ torch.tensor([[1.0, 1, 0]])
    sparse = torch.zeros(3, 3)
    sparse[1, 0], sparse[2, 2] = 1, -1
    return low_rank, sparse


def test_a_worked_example():
    found = contributions(*worked_example())
    assert found.sigma.tolist() == pytest.approx([2.920810, 1, 0.684742], abs=1e-6)
    assert found.low_rank.tolist() == pytest.approx([2.728391, 0, 0.045110], abs=1e-6)
    assert found.sparse.tolist() == pytest.approx([0.192418, 1, 0.639632], abs=1e-6)
    assert head_share(found, 1) == pytest.approx(0.934122, abs=1e-6)
    assert tail_share(found, 1) == pytest.approx(0.978971, abs=1e-6)


def test_the_contributions_add_up_to_the_singular_values():
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(40, 8, generator=generator) @ torch.randn(8, 60, generator=generator)
    sparse = torch.randn(40, 60, generator=generator) * (torch.rand(40, 60, generator=generator) < 0.05)
    found = contributions(low_rank, sparse)
    assert torch.allclose(found.low_rank + found.sparse, found.sigma, atol=1e-12)


def test_without_a_sparse_part_the_head_is_all_of_it():
    low_rank, _ = worked_example()
    found = contributions(low_rank, torch.zeros(3, 3))
    assert head_share(found, 1) == pytest.approx(1)


def test_a_full_rank_has_no_tail():
    assert tail_share(contributions(*worked_example()), 3) is None


def test_noise_lies_in_a_subspace_by_its_dimension():
    generator = torch.Generator().manual_seed(0)
    basis = orthonormal_basis(torch.randn(100, 25, generator=generator))
    assert energy_in_columns(torch.randn(100, 2000, generator=generator), basis) == pytest.approx(0.25, rel=0.03)
    assert energy_in_columns(basis @ torch.randn(25, 7, dtype=torch.float64), basis) == pytest.approx(1)
