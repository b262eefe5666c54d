"""Every metric against worked examples, and the identities that hold for any spectrum."""

import math

import pytest
import torch
from torch import Tensor

from lrtrain.measure.metrics import (
    condition_number,
    effective_rank,
    effective_rank_energy,
    nuclear_norm_bounds,
    numerical_rank,
    summarize,
    welore_ratio,
)

F1 = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
F2 = torch.tensor([5.0, 3.0], dtype=torch.float64)
F3 = torch.tensor([math.sqrt(21), math.sqrt(3)], dtype=torch.float64)

EXPECTED = {
    "entropy": (1.213008, 0.661563, 0.587481),
    "erank": (3.363586, 1.937819, 1.799450),
    "erank_energy": (2.276322, 1.782331, 1.457569),
    "stable_rank": (1.375, 1.36, 1.142857),
    "nuclear_norm": (8.0, 8.0, 6.314627),
    "frobenius_norm": (4.690416, 5.830952, 4.898979),
    "participation_ratio": (1.766423, 1.637394, 1.28),
    "energy_rank_90": (2, 2, 2),
    "energy_rank_95": (3, 2, 2),
    "energy_rank_99": (4, 2, 2),
    "log10_condition": (math.log10(4), math.log10(5 / 3), math.log10(math.sqrt(7))),
    "nuclear_over_spectral": (2.0, 1.6, 1 + 1 / math.sqrt(7)),
    "rank_above_1pct": (4, 2, 2),
    "welore_ratio": (0.5, 0.5, 0.5),
    "erank_rel": (3.363586 / 4, 1.937819 / 2, 1.799450 / 2),
    "spectral_norm": (4.0, 5.0, math.sqrt(21)),
}
SCALE_FREE = ("entropy", "erank", "erank_energy", "stable_rank", "participation_ratio", "energy_rank_90")


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("which, sigma", list(enumerate((F1, F2, F3))))
def test_metrics_equal_the_worked_examples(name: str, which: int, sigma: Tensor):
    assert summarize(sigma, len(sigma))[name] == pytest.approx(EXPECTED[name][which], abs=1e-6)


def test_the_examples_cover_every_metric():
    assert summarize(F1, 4).keys() == EXPECTED.keys()


def test_effective_rank_of_a_steep_pair():
    sigma = torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert effective_rank(sigma) == pytest.approx(1.356131, abs=1e-6)
    assert effective_rank_energy(sigma) == pytest.approx(1.057118, abs=1e-6)


def test_the_ranks_are_ordered_for_every_spectrum():
    generator = torch.Generator().manual_seed(0)
    for length in range(1, 200):
        normal = torch.randn(length, dtype=torch.float64, generator=generator)
        sigma = normal.mul(2).exp().sort(descending=True).values
        m = summarize(sigma, length)
        ranks = [1.0, m["stable_rank"], m["participation_ratio"], m["erank_energy"], m["erank"], length]
        assert all(low <= high * (1 + 1e-12) for low, high in zip(ranks, ranks[1:], strict=False))


@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_ranks_ignore_the_scale(factor: float):
    plain, scaled = summarize(F1, 4), summarize(factor * F1, 4)
    assert [scaled[k] for k in SCALE_FREE] == pytest.approx([plain[k] for k in SCALE_FREE])


def test_appended_zeros_change_nothing_up_to_the_rank_cap():
    assert summarize(torch.cat([F1, torch.zeros(60)]), rank_cap=4) == pytest.approx(summarize(F1, 4))


def test_one_singular_value_has_rank_one():
    single = summarize(torch.tensor([3.0], dtype=torch.float64), 1)
    assert {single[k] for k in ("erank", "erank_energy", "stable_rank", "participation_ratio")} == {1.0}


def test_a_zero_matrix_has_norms_but_no_ratios():
    metrics = summarize(torch.zeros(4, dtype=torch.float64), 4)
    norms = ("nuclear_norm", "spectral_norm", "frobenius_norm")
    assert metrics == dict.fromkeys((*norms, "energy_rank_90", "energy_rank_95", "energy_rank_99"), 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_spectrum_that_is_not_finite_is_skipped(bad: float):
    assert summarize(torch.tensor([bad, 1.0]), 2) == {}


def test_a_singular_matrix_has_a_finite_logarithm_of_its_condition():
    sigma = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert condition_number(sigma) == math.inf
    assert summarize(sigma, 2)["log10_condition"] == pytest.approx(15.65, abs=0.01)


@pytest.mark.parametrize("threshold, pruned", [(0.05, 2), (0.135, 4), (0.5, 4)])
def test_welore_counts_what_is_small_beside_the_spread(threshold: float, pruned: int):
    sigma = torch.tensor([10, 6, 2, 1.5, 1.2, 1], dtype=torch.float64)
    assert welore_ratio(sigma, threshold) == pytest.approx(pruned / 6)


def test_zeros_beyond_the_possible_rank_mislead_welore():
    sigma = torch.tensor([10, 6, 2, 1], dtype=torch.float64)
    assert welore_ratio(sigma, 0.135) == 2 / 4
    assert welore_ratio(torch.cat([sigma, torch.zeros(4)]), 0.135) == 5 / 8
    assert summarize(torch.cat([sigma, torch.zeros(4)]), rank_cap=4)["welore_ratio"] == 2 / 4


def test_the_numerical_rank_depends_on_how_the_matrix_is_stored():
    sigma = torch.tensor([10, 1, 1e-5, 1e-8], dtype=torch.float64)
    assert numerical_rank(sigma, (4, 4), torch.float32) == 3
    assert numerical_rank(sigma, (4096, 4096), torch.float32) == 2
    assert numerical_rank(sigma, (4, 4), torch.float64) == 4


def test_rounding_to_bfloat16_adds_no_rank():
    generator = torch.Generator().manual_seed(0)
    low_rank = torch.randn(256, 16, generator=generator) @ torch.randn(16, 256, generator=generator)
    sigma = torch.linalg.svdvals(low_rank.bfloat16().double())
    assert numerical_rank(sigma, (256, 256), torch.float32) > 16
    assert numerical_rank(sigma, (256, 256), torch.bfloat16) <= 16


def test_a_leading_part_bounds_the_nuclear_norm():
    low, high = nuclear_norm_bounds(F1[:1], float((F1**2).sum()), 4)
    assert (low, high) == pytest.approx((4 + 1.5, 4 + 4.242641), abs=1e-6)
    assert low <= 8 <= high
