"""Estimated norms and ranks against those of all singular values."""

import math

import pytest
import torch
from torch import Tensor

from lrtrain.measure.estimates import estimated_metrics, lanczos
from lrtrain.measure.metrics import summarize

ESTIMATED = ("nuclear_norm", "entropy", "erank", "erank_energy", "participation_ratio")


def matrix(kind: str) -> Tensor:
    """(160, 200) or its transpose."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(160, 200, generator=generator)
    if kind == "noise":
        return noise.T
    if kind == "sparse-plus-low-rank":
        low_rank = torch.randn(160, 24, generator=generator) @ torch.randn(24, 200, generator=generator)
        return low_rank / 5 + noise * (torch.rand(160, 200, generator=generator) < 0.03)
    u, _, vt = torch.linalg.svd(noise, full_matrices=False)
    return (u * torch.arange(1, 161) ** -0.7) @ vt


@pytest.mark.parametrize("kind", ["noise", "sparse-plus-low-rank", "power-law"])
@pytest.mark.full
def test_the_truth_is_within_two_standard_errors_for_most_seeds(kind: str):
    weight, seeds = matrix(kind), 100
    truth = summarize(torch.linalg.svdvals(weight.double()), 160)
    found = [estimated_metrics(weight, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    for metric in ESTIMATED:
        errors = [(f[f"{metric}_estimated"] - truth[metric], f[f"{metric}_estimated_stderr"]) for f in found]
        within = sum(abs(error) <= 2 * stderr for error, stderr in errors) / seeds
        assert within >= 0.82, (metric, within)  # Student's 0.93 at 15 degrees of freedom, and what 100 seeds scatter
        assert max(stderr for _, stderr in errors) < 0.08 * truth[metric], metric
    assert found[0]["spectral_norm_estimated"] == pytest.approx(truth["spectral_norm"], rel=5e-3)
    assert found[0]["frobenius_norm"] == pytest.approx(truth["frobenius_norm"], rel=1e-6)


def test_lanczos_is_exact_where_the_krylov_space_is_exhausted():
    weight = torch.tensor([[3.0, 2, 2], [2, 3, -2]])  # WWᵀ = (17, 8; 8, 17) with eigenvalues 25 and 9
    root = math.sqrt(0.5)
    starts = torch.tensor([[1.0, root, root], [0.0, root, -root]])
    nodes, weights = lanczos(weight, starts, 2)
    assert (weights * nodes.sqrt()).sum(1).tolist() == pytest.approx([4.0, 5.0, 3.0], rel=1e-6)


def test_estimates_are_the_seeds_alone_and_scale_with_the_matrix():
    weight = matrix("noise")
    one, again, larger = (estimated_metrics(w, torch.Generator().manual_seed(3)) for w in (weight, weight, 8 * weight))
    assert one == again
    assert larger["nuclear_norm_estimated"] == pytest.approx(8 * one["nuclear_norm_estimated"], rel=1e-4)
    assert larger["erank_estimated"] == pytest.approx(one["erank_estimated"], rel=1e-4)


def test_zero_and_broken_matrices_have_norms_and_nothing():
    generator = torch.Generator()
    assert set(estimated_metrics(torch.zeros(64, 70), generator).values()) == {0.0}
    assert estimated_metrics(torch.full((64, 70), math.nan), generator) == {}
