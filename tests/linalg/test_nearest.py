"""The nearest factors to a known matrix, against independent solutions of the same problems."""

import pytest
import torch

from lrtrain.linalg.nearest import Fit, low_rank_plus_sparse


def problem(m: int, n: int, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W (m, n) with a decaying spectrum and inputs X (n, tokens) of very different directions, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    weight = u * (s / torch.arange(1, len(s) + 1)) @ vt
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / torch.arange(1, n + 1).sqrt()
    return weight, mix @ torch.randn(n, tokens, generator=generator, dtype=torch.float64)


def truncated(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_outputs_are_the_best_that_a_rank_allows(shape: tuple[int, int]):
    """No W' of rank r comes nearer to W X than the truncated SVD of W X itself, and this one comes as near."""
    weight, x = problem(*shape)
    fit = Fit(x @ x.T)
    left, right = fit.low_rank(weight, 6)
    assert (left.shape, right.shape) == ((shape[0], 6), (6, shape[1]))
    outputs = weight @ x
    best = (outputs - truncated(outputs, 6)).norm()
    assert (outputs - left @ right @ x).norm() == pytest.approx(best.item(), rel=1e-6)
    assert fit.spectrum(weight)[6:].norm() == pytest.approx(best.item(), rel=1e-6)
    plain, _ = Fit().low_rank(weight, 6), None
    assert (outputs - plain[0] @ plain[1] @ x).norm() > 1.05 * best


def test_without_a_text_it_is_the_truncated_svd():
    weight, _ = problem(24, 40)
    left, right = Fit().low_rank(weight, 6)
    assert torch.allclose(left @ right, truncated(weight, 6), atol=1e-10)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("dead", [0, 30])
def test_at_full_rank_it_is_the_weight_whatever_the_text_lacks(shape: tuple[int, int], dead: int):
    """Also where inputs are always zero, or there are fewer tokens than inputs."""
    weight, x = problem(*shape, tokens=20)
    x[:dead] = 0
    left, right = Fit(x @ x.T).low_rank(weight, min(shape))
    assert torch.allclose(left @ right, weight, atol=1e-6)


def test_the_first_columns_are_the_best_of_a_smaller_rank():
    weight, x = problem(24, 40)
    fit = Fit(x @ x.T)
    (left, right), (small_left, small_right) = fit.low_rank(weight, 8), fit.low_rank(weight, 3)
    assert torch.allclose(left[:, :3] @ right[:3], small_left @ small_right, atol=1e-8)


@pytest.mark.parametrize("text", [False, True])
def test_values_on_a_support_solve_the_least_squares_problem(text: bool):
    weight, x = problem(10, 14)
    mask = torch.rand(10, 14, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[3] = False  # a row without any
    fit = Fit(x @ x.T) if text else Fit()
    found = torch.zeros_like(weight)
    found[mask] = fit.on_support(weight, mask.flatten().nonzero().flatten(), room=60)
    inputs = x if text else torch.eye(14, dtype=x.dtype)
    for row in range(10):
        on = inputs[mask[row]].T  # (tokens, entries)
        expected = torch.linalg.lstsq(on, inputs.T @ weight[row]).solution
        assert torch.allclose(found[row, mask[row]], expected, atol=1e-5)


@pytest.mark.parametrize("text", [False, True])
def test_alternation_never_gets_worse_and_beats_one_part_alone(text: bool, monkeypatch: pytest.MonkeyPatch):
    weight, x = problem(24, 40)
    fit = Fit(x @ x.T) if text else Fit()
    positions = torch.randperm(960, generator=torch.Generator().manual_seed(2))[:200].sort().values
    errors = []
    for rounds in (1, 2, 4, 8):
        monkeypatch.setattr("lrtrain.linalg.nearest.ROUNDS", rounds)
        left, right, values = low_rank_plus_sparse(weight, 4, fit, lambda _: positions)
        sparse = torch.zeros_like(weight).put_(positions, values)
        errors.append(fit.error(weight - left @ right - sparse))
    left, right = fit.low_rank(weight, 4)
    assert errors == sorted(errors, reverse=True) and errors[0] < fit.error(weight - left @ right)


def test_a_planted_sum_is_found(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    low_rank = truncated(torch.randn(96, 80, generator=generator, dtype=torch.float64), 5)
    positions = torch.randperm(96 * 80, generator=generator)[:230].sort().values
    spikes = 10 * low_rank.std() * torch.randn(230, generator=generator, dtype=torch.float64)
    weight = low_rank + torch.zeros_like(low_rank).put_(positions, spikes)
    monkeypatch.setattr("lrtrain.linalg.nearest.ROUNDS", 30)
    left, right, values = low_rank_plus_sparse(weight, 5, Fit(), lambda _: positions)
    assert (left @ right - low_rank).norm() < 1e-4 * low_rank.norm()
    assert torch.allclose(values, spikes, atol=1e-3)
