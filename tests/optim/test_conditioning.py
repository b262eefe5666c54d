"""Factors wider than the rank of what they fit: which methods crawl, and which do not.

min ½‖BA − W‖² for W (50, 50) of rank 3 and factors of rank 8 in float64; relative errors in the Frobenius norm.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lrtrain.layers.rebalance import balanced, left_orthonormal
from lrtrain.optim.loro import tangent_step
from lrtrain.optim.preconditioned import cholesky_of_gram, precondition_left, precondition_right

Factors = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor, Tensor], Factors]
EVEN, UNEVEN = (1.0, 0.8, 0.6), (1.0, 0.1, 0.01)


def descend(ratio: float, lr: float) -> Step:
    return lambda left, right, of_left, of_right: (left - ratio * lr * of_left, right - lr * of_right)


def preconditioned(left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor) -> Factors:
    of_left = precondition_left(of_left, cholesky_of_gram(right @ right.T, 1e-6))
    of_right = precondition_right(of_right, cholesky_of_gram(left.T @ left, 1e-6))
    return left - 0.5 * of_left, right - 0.5 * of_right


def riemannian(left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor) -> Factors:
    return tangent_step(left, right, of_left, of_right, lr=0.5)


def error_after(
    steps: int,
    step: Step,
    sigma: tuple[float, ...] = EVEN,
    scale: float = 0.1,
    rank: int = 8,
    change: Callable[[Tensor, Tensor], Factors] | None = None,
    at: int = 300,
) -> float:
    """‖BA − W‖/‖W‖, for factors of about the norm `scale` at the start that `change` replaces after `at` steps."""
    dice = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    u, v = torch.linalg.qr(draw(50, 3)).Q, torch.linalg.qr(draw(50, 3)).Q
    weight = (u * torch.tensor(sigma, dtype=torch.float64)) @ v.T
    left, right = scale / 50**0.5 * draw(50, rank), scale / 50**0.5 * draw(rank, 50)
    for done in range(steps):
        if change is not None and done == at:
            left, right = change(left, right)
        gradient = left @ right - weight
        left, right = step(left, right, gradient @ right.T, left.T @ gradient)
    return ((left @ right - weight).norm() / weight.norm()).item()


def test_surplus_rank_makes_descent_crawl_and_rebalancing_once_ends_it():
    plain = descend(1, 0.7)
    assert error_after(320, plain, rank=3) < 1e-6  # the rank of what is fitted
    assert error_after(1000, plain) > 1e-4
    assert error_after(1000, plain, change=balanced) > 1e-4
    assert error_after(320, plain, change=left_orthonormal) < 1e-6


def test_rebalancing_before_the_small_directions_are_found_does_not_help():
    """Directions outside of U are then learned at the rate σ²/β² instead of σ."""
    early = error_after(1000, descend(1, 0.7), sigma=UNEVEN, change=left_orthonormal, at=100)
    assert early > 2 * error_after(1000, descend(1, 0.7), sigma=UNEVEN) > 2e-4


@pytest.mark.parametrize("sigma", [EVEN, UNEVEN])
@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("step", [preconditioned, riemannian])
def test_steps_on_the_product_depend_on_neither_condition_nor_start(step: Step, sigma: tuple[float, ...], scale: float):
    assert error_after(40, step, sigma, scale) < 1e-6


def test_a_higher_rate_for_one_factor_helps_from_a_large_start_alone():
    """Its unequal growth is what moves the surplus directions; from a small start both grow alike."""
    assert error_after(1000, descend(4, 0.3), scale=0.3) < 1e-6 < 1e-4 < error_after(1000, descend(1, 0.7), scale=0.3)
    assert error_after(1000, descend(4, 0.3), scale=0.01) > 1e-5
