"""The layer against the matrix that it stands for."""

import pytest
import torch
from layers.gated import GatedLinear


@pytest.fixture
def layer() -> GatedLinear:
    made = GatedLinear(12, 8, bias=True, rank=4, init_std=0.02)
    made.load_state_dict(made.init_parameters(torch.Generator().manual_seed(0)))
    return made.double()


def test_the_output_is_that_of_the_dense_weight(layer: GatedLinear):
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.dense_weight().T + layer.B.bias)


def test_the_singular_values_are_those_of_the_dense_weight(layer: GatedLinear):
    torch.testing.assert_close(layer.singular_values()[:4], torch.linalg.svdvals(layer.dense_weight())[:4])


def test_every_parameter_gets_a_gradient_and_has_a_role(layer: GatedLinear):
    layer(torch.randn(3, 12, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert name in layer.roles
