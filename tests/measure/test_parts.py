"""The parts of W = L + S against a worked example, and what an untrained layer shows."""

import pytest
import torch

from lrtrain.measure.parts import contributions, head_and_tail, head_share, tail_share


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


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_an_untrained_layer_shows_head_and_tail_and_so_does_its_null(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, shape[1], generator=generator)
    sparse = 0.1 * torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < 0.1)
    shares, _ = head_and_tail(low_rank, sparse, 8, generator)
    assert shares["head_share"] > 0.99 and shares["head_share_null"] == pytest.approx(shares["head_share"], abs=0.01)
    assert shares["tail_share"] > 0.99 and shares["tail_share_null"] == pytest.approx(shares["tail_share"], abs=0.01)
    own = torch.linalg.svdvals(sparse.double())[0] / torch.linalg.svdvals(low_rank.double())[7]
    assert shares["sparse_over_low_rank"] == pytest.approx(float(own), rel=1e-6)


def test_what_is_not_defined_is_left_out():
    low_rank, sparse = worked_example()
    zero, generator = torch.zeros(3, 3), torch.Generator()
    assert head_and_tail(zero, zero, 1, generator) == ({}, {})
    assert head_and_tail(low_rank, torch.full((3, 3), torch.nan), 1, generator) == ({}, {})
    without, _ = head_and_tail(zero, sparse, 1, generator)  # B = 0, as SLTrain begins
    assert "sparse_over_low_rank" not in without
    assert without["head_share"] == 0
