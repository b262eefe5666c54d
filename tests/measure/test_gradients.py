"""Spectra of gradients against SVDs. Shards: tests/distributed/test_spectra.py."""

import pytest
import torch
from torch import nn

from lrtrain.core.metrics import spelled
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.measure.gradients import GradientSpectra, with_gradients
from lrtrain.measure.metrics import effective_rank


def dense_layer(out_features: int, in_features: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=False)
    layer.weight.grad = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    return layer


def low_rank_layer(in_features: int, out_features: int, rank: int) -> LowRankLinear:
    own = {"init": "xavier", "init_std": 0.02, "residual": False, "residual_alpha": 1.0, "rebalance_at": None}
    return LowRankLinear(in_features, out_features, False, rank, **own)


def test_a_dense_gradient_is_measured_as_an_svd_would():
    layer = dense_layer(12, 20)
    metrics = spelled(GradientSpectra().measure({"h.0.q_proj": layer}))
    sigma = torch.linalg.svdvals(layer.weight.grad.double())
    expected = {
        "nuclear_norm": sigma.sum(),
        "erank": effective_rank(sigma),
        "captured_quarter": sigma[:3].square().sum() / sigma.square().sum(),
    }
    for metric, value in expected.items():
        assert metrics[f"gradients/h.0.q_proj/{metric}"] == pytest.approx(float(value), rel=1e-6)
        assert metrics[f"gradients/summary/q_proj/{metric}_mean"] == metrics[f"gradients/h.0.q_proj/{metric}"]
    assert not any("overlap" in name for name in metrics)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_overlap_is_that_of_leading_singular_vectors(shape):
    layer, spectra = dense_layer(*shape), GradientSpectra()
    spectra.measure({"a": layer})
    assert spelled(spectra.measure({"a": layer}))["gradients/a/overlap"] == pytest.approx(1, abs=1e-6)
    before, now = layer.weight.grad, dense_layer(*shape, seed=1).weight.grad
    layer.weight.grad = now
    sides = [g if shape[0] < shape[1] else g.T for g in (before, now)]
    u, v = (torch.linalg.svd(g.double()).U[:, :3] for g in sides)
    found = spelled(spectra.measure({"a": layer}))
    assert found["gradients/a/overlap"] == pytest.approx(float((u.T @ v).square().sum()) / 3)


def test_the_gradients_of_factors_and_what_they_make_of_the_product():
    layer = low_rank_layer(3, 3, 2)
    with torch.no_grad():
        layer.B.weight.copy_(torch.tensor([[1.0, 0], [2, 1], [0, 2]]))
        layer.A.weight.copy_(torch.tensor([[1.0, 1, 0], [0, 1, 1]]))
    dense = torch.diag(torch.tensor([1.0, 2, 1]))  # of the product: T = G_B A + B G_A has σ = 17.059042, 3.998636, 0
    (layer.dense_weight() * dense).sum().backward()
    metrics = spelled(GradientSpectra().measure({"a": layer}))
    assert metrics["gradients/a/induced_erank"] == pytest.approx(
        effective_rank(torch.tensor([17.059042, 3.998636], dtype=torch.float64)), rel=1e-5
    )
    sigma = torch.linalg.svdvals(layer.B.weight.grad)
    assert metrics["gradients/a/left_nuclear_norm"] == pytest.approx(float(sigma.sum()))
    assert "gradients/a/right_erank" in metrics and "gradients/a/nuclear_norm" not in metrics


@pytest.mark.parametrize("bad", [0.0, float("nan"), None])
def test_gradients_that_are_zero_not_finite_or_missing_have_no_metrics(bad):
    layer = dense_layer(4, 6)
    layer.weight.grad = None if bad is None else torch.full((4, 6), bad)
    assert GradientSpectra().measure({"a": layer}) == []


def test_the_twin_leaves_the_layer_as_it_is():
    layer = low_rank_layer(6, 4, 2)
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    twin = with_gradients(layer)
    assert not dict(twin.named_parameters())
    for name, p in layer.named_parameters():
        assert torch.equal(p, weights[name])
