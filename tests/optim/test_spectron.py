"""Spectron against its formulas with SVDs, and the bound on its steps."""

import pytest
import torch
from factored import Model, gradient, lowrank, set_gradients
from launching import OPTIM
from torch import Tensor, nn

from lrtrain.optim.orthogonal import ITERATIONS
from lrtrain.optim.spectron import Spectron
from lrtrain.optim.stacks import Stack

OWN = {"momentum": 0.95, "iterations": 2, "orthogonalization": "polar_express"}


def nearly_orthogonal(x: Tensor, name: str) -> Tensor:
    """U f(S) Vᵀ with the polynomials that Newton-Schulz iteration applies to the singular values."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for a, b, c in ((3.4445, -4.7750, 2.0315),) * 5 if name == "quintic" else ITERATIONS[name]:
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


@pytest.mark.parametrize("name", ITERATIONS)
def test_steps_are_those_of_the_formulas(name: str):
    """The norms of the factors by as many iterations as make them exact, in float64."""
    model = Model()
    pairs = [[p.detach().double() for p in factors] for factors in model.factors()]
    averages = [[torch.zeros_like(p) for p in pair] for pair in pairs]
    optimizer = Spectron(model, momentum=0.9, iterations=60, orthogonalization=name, **OPTIM)
    for _ in set_gradients(model, 6):
        for factors, pair, average in zip(model.factors(), pairs, averages, strict=True):
            rate = 0.01 / (1 + sum(torch.linalg.matrix_norm(p, 2) for p in pair))
            for i, p in enumerate(factors):
                average[i] = 0.9 * average[i] + 0.1 * gradient(p)
            pair[:] = [p - rate * nearly_orthogonal(m, name) for p, m in zip(pair, average, strict=True)]
        optimizer.step()
    for factors, pair in zip(model.factors(), pairs, strict=True):
        for found, expected in zip(factors, pair, strict=True):
            torch.testing.assert_close(found.detach().double(), expected, rtol=1e-3, atol=2e-5)


class Large(nn.Module):
    """A tall and a square layer whose factors have norms between .3 and 4."""

    def __init__(self, scale: float):
        super().__init__()
        self.own = [lowrank(48, 128, 24), lowrank(64, 64, 16)]
        self.layers = nn.ModuleList(self.own)
        dice = torch.Generator().manual_seed(0)
        for layer in self.own:
            layer.load_state_dict({k: scale * v for k, v in layer.init_parameters(dice).items()})


@pytest.mark.parametrize("scale", [0.2, 2.0])
@pytest.mark.parametrize("lr", [0.01, 0.5])
@pytest.mark.parametrize("aligned", [False, True])
def test_no_step_moves_the_product_by_more_than_the_learning_rate(scale: float, lr: float, aligned: bool):
    """Not for gradients ∂B = −B, ∂A = −A either, in which both parts of the step point where B A does."""
    model = Large(scale)
    optimizer = Spectron(model, **OWN, **{**OPTIM, "lr": lr})
    largest = 0.0
    for _ in set_gradients(model, 30):
        if aligned:
            for layer in model.own:
                layer.A.weight.grad, layer.B.weight.grad = -layer.A.weight.detach(), -layer.B.weight.detach()
        before = [layer.dense_weight().detach() for layer in model.own]
        optimizer.step()
        for layer, old in zip(model.own, before, strict=True):
            largest = max(largest, torch.linalg.matrix_norm(layer.dense_weight().detach() - old, 2).item() / lr)
    assert 0.05 < largest < 1.25


def test_a_zero_factor_keeps_its_vector_and_moves():
    model = Model()
    left = model.own[0].B.weight
    nn.init.zeros_(left)
    optimizer = Spectron(model, **OWN, **OPTIM)
    start = optimizer.state[left]["vector"].clone()
    for step in set_gradients(model, 3):
        optimizer.step()
        vector = optimizer.state[left]["vector"]
        assert vector.norm().item() == pytest.approx(1, abs=1e-5)
        if step == 1:
            assert torch.dot(vector, start / start.norm()) > 0.999
    assert torch.linalg.matrix_norm(left.detach(), 2) > 0.01


def test_the_norms_are_close_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch):
    model = Large(1.0)
    optimizer = Spectron(model, **OWN, **{**OPTIM, "lr": 0.05})
    pair_terms, shares = optimizer.pair_terms, []

    def recorded(left: Stack, right: Stack) -> tuple[Tensor, Tensor]:
        found = pair_terms(left, right)
        exact = sum(torch.linalg.matrix_norm(stack.first.detach(), 2) for stack in (left, right))
        shares.append((found[0] / exact).item())
        return found

    monkeypatch.setattr(optimizer, "pair_terms", recorded)
    for _ in set_gradients(model, 20):
        optimizer.step()
    assert len(shares) == 40 and 0.98 < min(shares) and max(shares) < 1 + 1e-5
