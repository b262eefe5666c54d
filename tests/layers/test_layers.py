"""Claims that hold for every parameterization, and those of each."""

from functools import partial

import pytest
import torch
from torch import Tensor

from lrtrain.layers.base import FactorizedLinear
from lrtrain.layers.initial import gaussian_spectrum, spectral_factors
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.layers.sltrain import SLTrainLinear

SLTRAIN = partial(SLTrainLinear, density=0.2, support="uniform", block=2, alpha=4.0, scale="alpha_over_r")
METHODS = {
    "lowrank": partial(LowRankLinear, init="spectral", init_std=0.02),
    "lowrank-lora": partial(LowRankLinear, init="lora", init_std=0.02),
    "lowrank-xavier": partial(LowRankLinear, init="xavier", init_std=0.02),
    "sltrain-materialize": partial(SLTRAIN, execution="materialize"),
    "sltrain-factored": partial(SLTRAIN, execution="factored"),
    "sltrain-row-balanced-materialize": partial(SLTRAIN, support="row_balanced", execution="materialize"),
    "sltrain-row-balanced": partial(SLTRAIN, support="row_balanced", execution="factored"),
    "sltrain-block-materialize": partial(SLTRAIN, support="block", execution="materialize"),
    "sltrain-block": partial(SLTRAIN, support="block", execution="factored"),
}
every_method = pytest.mark.parametrize("method", METHODS)


def make(method: str, in_features=12, out_features=10, rank=3, bias=True, perturb=True) -> FactorizedLinear:
    """A float64 layer away from its start, where B = 0 would hide mistakes."""
    layer = METHODS[method](in_features, out_features, bias, rank)
    generator = torch.Generator().manual_seed(0)
    state = layer.init_parameters(generator)
    assert state.keys() == dict(layer.named_parameters()).keys() == layer.roles.keys() - (set() if bias else {"B.bias"})
    with torch.no_grad():
        for name, value in state.items():
            parameter = layer.get_parameter(name)
            assert value.shape == parameter.shape
            parameter.copy_(value + perturb * 0.3 * torch.randn(value.shape, generator=generator))
        for name, value in layer.init_buffers(generator).items():
            layer.get_buffer(name).copy_(value)
    return layer.double()


@every_method
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_the_dense_weight(method: str, bias: bool):
    layer = make(method, bias=bias)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.B.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@every_method
def test_gradients_pass_gradcheck(method: str):
    layer = make(method)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters))


@every_method
def test_singular_values_are_those_of_the_dense_weight(method: str):
    layer = make(method)
    found = layer.singular_values()
    expected = torch.linalg.svdvals(layer.dense_weight())
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-8, atol=1e-8)
    assert (expected[len(found) :] < 1e-8).all()


@every_method
def test_initial_values_are_a_function_of_the_generator(method: str):
    layer = METHODS[method](12, 10, True, 3)
    first, second, other = (layer.init_parameters(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_method
def test_training_lowers_the_loss(method: str):
    layer, target = make(method, perturb=False), torch.randn(10, 12, dtype=torch.float64)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02)
    x = torch.randn(256, 12, dtype=torch.float64)
    losses = []
    for _ in range(100):
        loss = (layer(x) - x @ target.T).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@every_method
def test_compiles_without_graph_breaks_and_agrees(method: str):
    layer = make(method).float()
    x = torch.randn(6, 12)
    expected = layer(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True)
    found = compiled(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-4)


# --- lowrank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_full_rank_lowrank_equals_dense(shape: tuple[int, int]):
    weight, bias = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64)
    layer = LowRankLinear.from_dense(weight, min(shape), bias)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, bias), rtol=1e-12, atol=1e-12)


def test_lowrank_from_dense_is_the_best_approximation():
    weight = torch.randn(8, 11, dtype=torch.float64)
    left = weight - LowRankLinear.from_dense(weight, 3).dense_weight()
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(left.norm(), sigma[3:].norm())


@pytest.mark.parametrize("m,n", [(256, 256), (344, 128), (128, 344)])
def test_spectral_init_has_the_spectrum_of_a_gaussian(m: int, n: int):
    rank, generator = 32, torch.Generator().manual_seed(0)
    left, right = spectral_factors(m, n, rank, 0.02, generator)
    found = torch.linalg.svdvals((left @ right).double())[:rank]
    drawn = [torch.linalg.svdvals(0.02 * torch.randn(m, n, generator=generator).double()) for _ in range(8)]
    expected = torch.stack(drawn).mean(0)
    torch.testing.assert_close(found, expected[:rank], rtol=0.02, atol=0)
    torch.testing.assert_close(gaussian_spectrum(m, n, 0.02), expected, rtol=0.02, atol=0.01 * expected[0].item())
    balance = left.T.double() @ left.double() - right.double() @ right.T.double()
    assert balance.abs().max() < 1e-6  # BᵀB = AAᵀ: the split is even
