"""LORO's large step against the dense computation, and what surrounds it."""

import pytest
import torch
from factored import Model, gradient, set_gradients
from launching import OPTIM
from torch import Tensor

from lrtrain.errors import ConfigError
from lrtrain.layers.rebalance import balanced
from lrtrain.optim.adam import adam_direction
from lrtrain.optim.loro import LORO, tangent_step

OWN = {"every": 3, "large_step": "exact", "refresh": True, "approx_scale": None}
SHAPES = [(31, 12, 5), (8, 33, 3), (16, 16, 9), (13, 7, 7), (20, 20, 1)]  # tall, wide, 2r > min(m, n), r = n
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def drawn(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """B, A and G."""
    m, n, r = shape
    dice = torch.Generator().manual_seed(0)
    left, right, g = (torch.randn(*s, generator=dice, dtype=torch.float64) for s in ((m, r), (r, n), (m, n)))
    return left, right, g


def dense_step(left: Tensor, right: Tensor, g: Tensor, lr: float) -> Tensor:
    """The best rank-r approximation of W − lr·(P_B G + G P_A − P_B G P_A), by dense SVDs."""
    weight, rank = left @ right, len(right)
    of_left, of_right = left @ torch.linalg.pinv(left), torch.linalg.pinv(right) @ right
    tangent = of_left @ g + g @ of_right - of_left @ g @ of_right
    u, sigma, vt = torch.linalg.svd(weight - lr * tangent, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


@shapes
@pytest.mark.parametrize("lr", [0.0, 0.01, 1.0])
def test_with_true_gradients_a_large_step_is_the_retracted_riemannian_one(shape: tuple[int, int, int], lr: float):
    left, right, g = drawn(shape)
    new_left, new_right = tangent_step(left, right, g @ right.T, left.T @ g, lr)
    expected = dense_step(left, right, g, lr)
    assert (new_left @ new_right - expected).norm() < 1e-12 * expected.norm()
    torch.testing.assert_close(new_left.T @ new_left, new_right @ new_right.T, rtol=1e-10, atol=1e-10)


@shapes
def test_it_does_not_depend_on_how_the_product_is_factored(shape: tuple[int, int, int]):
    left, right, g = drawn(shape)
    change = torch.eye(shape[2], dtype=torch.float64) + 0.5 * torch.rand(shape[2], shape[2], dtype=torch.float64)
    other = left @ change, torch.linalg.solve(change, right)
    here, there = (tangent_step(b, a, g @ a.T, b.T @ g, 0.1) for b, a in ((left, right), other))
    torch.testing.assert_close(here[0] @ here[1], there[0] @ there[1], rtol=1e-9, atol=1e-9)


def test_a_factor_that_lost_rank_stays_finite():
    left, right, g = drawn((31, 12, 5))
    left[:, 2] = 0
    new_left, new_right = tangent_step(left, right, g @ right.T, left.T @ g, 0.1)
    assert torch.isfinite(new_left).all() and torch.isfinite(new_right).all()


def reference(large_step: str, refresh: bool, approx_scale: float | None, steps: int) -> list[Tensor]:
    """The products after so many steps, from the formulas in float64."""
    model = Model()
    pairs = [[p.detach().double() for p in factors] for factors in model.factors()]
    moments = [[[torch.zeros_like(p) for _ in range(2)] for p in pair] for pair in pairs]
    for step in set_gradients(model, steps):
        for given, pair, state in zip(model.factors(), pairs, moments, strict=True):
            count = (step - 1) % 3 + 1 if refresh else step
            moves = [adam_direction(gradient(p), *s, count, 0.9, 0.99, 1e-8) for p, s in zip(given, state, strict=True)]
            scale = len(pair[1]) / min(len(pair[0]), pair[1].shape[1]) if approx_scale is None else approx_scale
            if step % 3 == 0 and large_step == "exact":
                pair[:] = tangent_step(*pair, *moves, lr=0.01)
            else:
                pair[:] = [p - 0.01 * scale * move for p, move in zip(pair, moves, strict=True)]
                if step % 3 == 0 and large_step == "balanced":
                    pair[:] = balanced(*pair)
            if step % 3 == 0 and refresh:
                for s in state:
                    for moment in s:
                        moment.zero_()
    return [left @ right for left, right in pairs]


@pytest.mark.parametrize("large_step", ["exact", "balanced", "plain"])
@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize("approx_scale", [None, 1.0])
def test_steps_are_those_of_the_formulas(large_step: str, refresh: bool, approx_scale: float | None):
    model = Model()
    own = {"every": 3, "large_step": large_step, "refresh": refresh, "approx_scale": approx_scale}
    optimizer = LORO(model, **own, **OPTIM)
    for _ in set_gradients(model, 8):
        optimizer.step()
    for found, expected in zip(model.weights(), reference(large_step, refresh, approx_scale, 8), strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_first_step_after_a_refresh_is_the_published_one():
    """ε = 1e-6 on the root before bias correction: 0.1 g √.001/.1 / (√.001 |g| + ε) = 0.240 for g = 1e-5, where the
    corrected root would give 0.909."""
    for convention, expected in (("galore", 0.2403), ("corrected", 0.9091)):
        model = Model()
        settings = OPTIM | {"betas": [0.9, 0.999], "eps": 1e-6, "eps_convention": convention}
        optimizer = LORO(model, **{**OWN, "large_step": "plain", "approx_scale": 1.0}, **settings)
        for step in range(4):  # the third refreshes
            before = [p.detach().clone() for p in model.parameters()]
            for p in model.parameters():
                p.grad = torch.full_like(p, 1e-5 if step == 3 else 0.1)
            optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(old - p, torch.full_like(p, 0.01 * expected), rtol=1e-3, atol=1e-6)


def test_the_kinds_of_large_steps_differ():
    exact, balance, plain = (reference(kind, True, None, 8)[0] for kind in ("exact", "balanced", "plain"))
    assert (exact - plain).norm() > 0.01 * plain.norm() and (balance - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("refresh", [True, False])
def test_a_refresh_is_for_all_states(refresh: bool):
    model = Model()
    optimizer = LORO(model, **{**OWN, "refresh": refresh}, **OPTIM)
    for step in set_gradients(model, 4):
        optimizer.step()
        cleared = not any(value.any() for state in optimizer.state.values() for value in state.values())
        assert cleared == (refresh and step == 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_backward": True}, "optim.in_backward=true .* set optim.in_backward=false"),
        ({"lr_ratio": 4.0}, "optim.lr_ratio=4.0 .* set optim.lr_ratio=1"),
    ],
)
def test_what_it_refuses(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LORO(Model(), **{**OWN, **OPTIM, **changes})
