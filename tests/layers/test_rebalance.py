"""The same product in other factors, and layers that take them on once."""

import pytest
import torch
from launching import OPTIM
from torch import Tensor, nn

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.engine.revision import revise_layers
from lrtrain.errors import ConfigError
from lrtrain.layers.rebalance import balanced, left_orthonormal, product_svd
from lrtrain.model.build import make_model
from lrtrain.optim.adamw import AdamW

SHAPES = [(31, 12, 5), (8, 33, 3), (16, 16, 16), (20, 9, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def factors(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """With singular values over three orders of magnitude."""
    m, n, r = shape
    dice = torch.Generator().manual_seed(0)
    left = torch.randn(m, r, generator=dice, dtype=torch.float64) * torch.logspace(0, -3, r, dtype=torch.float64)
    return left, torch.randn(r, n, generator=dice, dtype=torch.float64)


@shapes
def test_the_product_stays_what_it_is(shape: tuple[int, int, int]):
    left, right = factors(shape)
    weight = left @ right
    u, sigma, vt = product_svd(left, right)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(weight)[: shape[2]], rtol=1e-9, atol=1e-12)
    for new in ((u * sigma, vt), balanced(left, right), left_orthonormal(left, right)):
        assert (new[0] @ new[1] - weight).norm() < 1e-12 * weight.norm()


@shapes
def test_what_the_factors_satisfy(shape: tuple[int, int, int]):
    left, right = factors(shape)
    eye, sigma = torch.eye(shape[2], dtype=torch.float64), torch.linalg.svdvals(left @ right)[: shape[2]]
    b, a = balanced(left, right)
    torch.testing.assert_close(b.T @ b, torch.diag(sigma), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a @ a.T, torch.diag(sigma), rtol=1e-9, atol=1e-12)
    b, a = left_orthonormal(left, right)
    torch.testing.assert_close(b.T @ b, sigma[0] * eye, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.linalg.matrix_norm(a, 2), sigma[0].sqrt(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["lowrank", "sltrain"])
def test_a_layer_is_rebalanced_once_and_its_moments_begin_anew(method: str):
    layer = choice(compose(f"param={method}", "param.rebalance_at=3").param)(
        in_features=33, out_features=20, bias=True, rank=4
    )
    dice = torch.Generator().manual_seed(0)
    for key, value in (layer.init_parameters(dice) | layer.init_buffers(dice)).items():
        layer.state_dict(keep_vars=True).get(key, layer._buffers.get(key)).data.copy_(value)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    optimizer = AdamW(model, **OPTIM)
    for step in range(1, 6):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=dice)
        optimizer.step()
        before, old = layer.dense_weight().detach(), layer.B.weight.detach().clone()
        revise_layers(model, optimizer, step, seed=0)
        torch.testing.assert_close(layer.dense_weight().detach(), before, rtol=1e-5, atol=1e-6)
        assert torch.equal(layer.B.weight, old) == (step != 3)
        for p in (layer.A.weight, layer.B.weight):
            assert optimizer.state[p]["exp_avg"].any().item() == (step != 3)
            assert optimizer.state[p]["step"] == (step if step < 3 else step - 3)
        assert optimizer.state[layer.B.bias]["step"] == step
    gram = layer.B.weight.T @ layer.B.weight
    assert (gram / gram[0, 0] - torch.eye(4)).abs().max() < 0.5  # two steps after


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["param=lowrank", "param.rebalance_at=0"], "param.rebalance_at=0 must be greater than 0, or null"),
        (["param=sltrain", "param.rebalance_at=0"], "param.rebalance_at=0 must be greater than 0, or null"),
        (
            ["param=lowrank", "param.rebalance_at=5", "param.residual=true"],
            "rebalance_at=5 .*residual=false",
        ),
    ],
)
def test_what_is_refused(overrides: list[str], message: str):
    small = ("model.config.hidden_size=32", "model.config.num_attention_heads=4", "param.rank=4")
    with pytest.raises(ConfigError, match=message):
        make_model(compose(*small, *overrides))
