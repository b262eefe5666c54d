"""Preconditioned factor gradients against their formulas, for another factorization, and in shards."""

import pytest
import torch
from factored import Model, gradient, set_gradients
from launching import OPTIM
from torch import Tensor

from lrtrain.optim.adam import adam_direction
from lrtrain.optim.preconditioned import PreconditionedAdamW, cholesky_of_gram, precondition_left, precondition_right

SHAPES = [(31, 12, 5), (8, 33, 3), (16, 16, 9)]


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    dice = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=dice, dtype=torch.float64) for shape in shapes]


def change_of_product(left: Tensor, right: Tensor, g: Tensor, damping: float) -> Tensor:
    """The first-order change of B A in a plain step, over −lr."""
    of_left, of_right = g @ right.T, left.T @ g
    if damping >= 0:
        of_left = precondition_left(of_left, cholesky_of_gram(right @ right.T, damping))
        of_right = precondition_right(of_right, cholesky_of_gram(left.T @ left, damping))
    return of_left @ right + left @ of_right


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_change_is_the_two_projections_for_any_factorization(shape: tuple[int, int, int]):
    m, n, r = shape
    left, right, g, change = drawn((m, r), (r, n), (m, n), (r, r))
    other = left @ change, torch.linalg.solve(change, right)
    here = change_of_product(left, right, g, 0)
    expected = left @ torch.linalg.pinv(left) @ g + g @ torch.linalg.pinv(right) @ right
    torch.testing.assert_close(here, expected, rtol=1e-10, atol=1e-10)
    assert (change_of_product(*other, g, 0) - here).norm() < 5e-9 * here.norm()
    plain = change_of_product(left, right, g, -1)
    assert (change_of_product(*other, g, -1) - plain).norm() > 0.5 * plain.norm()


@pytest.mark.parametrize("damping", [1e-6, 0.3])
@pytest.mark.parametrize("adam", [True, False])
def test_steps_are_those_of_the_formulas(damping: float, adam: bool):
    """In float64, with inverses."""
    model = Model()
    pairs = [[p.detach().double() for p in factors] for factors in model.factors()]
    moments = [[[torch.zeros_like(p) for _ in range(2)] for p in pair] for pair in pairs]
    optimizer = PreconditionedAdamW(model, damping, adam, **OPTIM)
    for step in set_gradients(model, 6):
        for (b, a), pair, state in zip(model.factors(), pairs, moments, strict=True):
            (left, right), eye = pair, torch.eye(len(pair[1]), dtype=torch.float64)
            moves = [
                gradient(b) @ torch.linalg.inv(right @ right.T + damping * eye),
                torch.linalg.inv(left.T @ left + damping * eye) @ gradient(a),
            ]
            if adam:
                moves = [adam_direction(g, *s, step, 0.9, 0.99, 1e-8) for g, s in zip(moves, state, strict=True)]
            pair[:] = [p - 0.01 * move for p, move in zip(pair, moves, strict=True)]
        optimizer.step()
    for found, expected in zip(model.factors(), pairs, strict=True):
        for p, q in zip(found, expected, strict=True):
            torch.testing.assert_close(p.detach().double(), q, rtol=1e-4, atol=1e-5)


def test_plain_descent_keeps_nothing():
    model = Model()
    optimizer = PreconditionedAdamW(model, 1e-6, False, **OPTIM)
    assert all(set(optimizer.state[p]) == {"step"} for p in optimizer.pair_of)


def test_a_zero_factor_stays_finite():
    model = Model()
    with torch.no_grad():
        model.own[0].B.weight.zero_()
    optimizer = PreconditionedAdamW(model, 1e-6, True, **OPTIM)
    for _ in set_gradients(model, 3):
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
