"""The Marchenko–Pastur law against integrated medians, and how many spikes are planted."""

import math

import pytest
import torch

from lrtrain.measure.noise import (
    finite_noise_edge,
    noise_edge,
    noise_median,
    noise_std,
    product_null_edge,
    soft_rank,
    spike_count,
)


def gaussian(m: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_edge_of_a_column():
    assert noise_edge((4, 1), 1.0) == 3.0
    assert noise_edge((1, 4), 2.0) == 6.0


@pytest.mark.parametrize("ratio, median", [(1, 0.652783), (0.5, 0.830466), (0.25, 0.916004), (0.1, 0.966565)])
def test_the_median_of_the_law(ratio: float, median: float):
    assert noise_median(ratio) == pytest.approx(median, abs=2e-5)


def test_the_std_and_the_spikes_of_a_planted_matrix():
    m, n, std = 1000, 250, 0.02
    noise = std * gaussian(m, n, 0)
    left, right = torch.linalg.qr(gaussian(m, 2, 1)).Q, torch.linalg.qr(gaussian(n, 2, 2)).Q
    strengths = torch.tensor([3.0, 1.5], dtype=torch.float64)
    sigma = torch.linalg.svdvals(noise + (left * strengths) @ right.T)
    assert noise_std(sigma, (m, n)) == pytest.approx(std, rel=0.01)
    assert spike_count(sigma, (m, n)) == 2
    assert soft_rank(sigma, (m, n)) == pytest.approx((noise_edge((m, n), std) / float(sigma[0])) ** 2, rel=0.03)


def test_pure_noise_exceeds_the_finite_edge_in_one_case_of_a_hundred():
    edge = finite_noise_edge((200, 50), 1.0)
    above = sum(float(torch.linalg.matrix_norm(gaussian(200, 50, seed), 2)) > edge for seed in range(400))
    assert above <= 9  # 4 expected; ten or more have a probability below 1 %
    bare = noise_edge((200, 50), 1.0)
    assert sum(float(torch.linalg.matrix_norm(gaussian(200, 50, seed), 2)) > bare for seed in range(100)) >= 5


def test_a_product_of_noise_exceeds_the_edge_of_its_entries_but_not_its_own():
    left, right = gaussian(1000, 64, 0), gaussian(64, 250, 1)
    sigma = torch.linalg.svdvals(left @ right)
    entries = float((left @ right).std())
    assert (sigma > noise_edge((1000, 250), entries)).sum() > 30
    null = product_null_edge(left, right, 1.0, torch.Generator().manual_seed(2))
    assert float(sigma[0]) == pytest.approx(null, rel=0.05)


def test_a_part_of_a_spectrum_is_refused():
    with pytest.raises(ValueError, match="not all 250"):
        noise_std(torch.ones(3), (1000, 250))


def test_a_scaled_matrix_has_a_scaled_edge():
    assert finite_noise_edge((30, 20), 0.5) == pytest.approx(finite_noise_edge((20, 30), 1.0) / 2)
    assert math.isclose(noise_edge((30, 20), 0.5), noise_edge((20, 30), 1.0) / 2)
