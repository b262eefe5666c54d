"""ReLoRA's merges, and what they do to optimizer states."""

import math

import pytest
import torch
from torch import Tensor, nn

from lrtrain.engine.revision import revise_layers
from lrtrain.layers.relora import ReLoRALinear

GOOD = {
    "merge_every": 5,
    "alpha": 8.0,
    "scale": "alpha_over_r",
    "prune": 0.9,
    "prune_by": "magnitude",
    "restart_counter": False,
    "init_std": 0.02,
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def started(**changes) -> nn.ModuleDict:
    """A model of one layer (48 → 40, rank 8), with its initial values."""
    layer = ReLoRALinear(48, 40, True, 8, **{**GOOD, **changes})
    layer.load_state_dict(layer.init_parameters(torch.Generator().manual_seed(0)))
    return nn.ModuleDict({"layer": layer})


def trained(model: nn.Module, steps: int = 4) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(64, 48), torch.randn(64, 40)
    for _ in range(steps):
        (model["layer"](x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def gradients(layer: ReLoRALinear) -> tuple[Tensor, Tensor]:
    layer(torch.randn(4, 48)).square().sum().backward()
    assert layer.A.weight.grad is not None and layer.B.weight.grad is not None
    return layer.A.weight.grad, layer.B.weight.grad


def test_the_first_step_moves_b_where_two_zero_factors_would_never_move():
    layer = started()["layer"]
    of_a, of_b = gradients(layer)
    assert not of_a.any() and of_b.norm() > 0  # ∂A = s·Bᵀ G is zero with B
    dead = started()["layer"]
    nn.init.zeros_(dead.A.weight)
    assert not any(gradient.any() for gradient in gradients(dead))


def test_a_merge_leaves_the_map_unchanged_and_begins_a_new_cycle():
    model = started()
    layer, optimizer = model["layer"], trained(model)
    x = torch.randn(6, 48)
    before, expected, frozen = layer.A.weight.clone(), layer(x), layer.weight.clone()
    assert layer.B.weight.any()
    revise_layers(model, optimizer, 5, seed=0)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.weight, frozen) and not layer.B.weight.any()
    assert layer.A.weight.abs().max() <= 1 / math.sqrt(48) and not torch.equal(layer.A.weight, before)


def test_merges_raise_the_rank_of_what_was_learned():
    model = started()
    layer, first = model["layer"], model["layer"].weight.clone()
    for cycle in range(1, 4):
        optimizer = trained(model)
        revise_layers(model, optimizer, 5 * cycle, seed=0)
        learned = torch.linalg.svdvals((layer.weight - first).double())
        assert (learned > 1e-5).sum() == 8 * cycle


@pytest.mark.parametrize("prune_by", ["magnitude", "random"])
@pytest.mark.parametrize("prune", [0.0, 0.8, 0.95, 1.0])
def test_a_merge_prunes_its_share_of_the_moments(prune: float, prune_by: str):
    model = started(prune=prune, prune_by=prune_by)
    layer, optimizer = model["layer"], trained(model)
    states = {name: optimizer.state[layer.get_parameter(name)] for name in ("A.weight", "B.weight", "bias")}
    before = {name: {k: v.clone() for k, v in state.items()} for name, state in states.items()}
    revise_layers(model, optimizer, 5, seed=0)
    for name in ("A.weight", "B.weight"):
        zero = states[name]["exp_avg"] == 0
        assert torch.equal(zero, states[name]["exp_avg_sq"] == 0)  # no first moment is left to be divided by eps
        for key in ("exp_avg", "exp_avg_sq"):
            old, new = before[name][key], states[name][key]
            assert old.all() and torch.equal(new[new != 0], old[new != 0])
            share = (new == 0).float().mean().item()
            assert share == pytest.approx(prune, abs=0.05 if prune_by == "random" else 0.005)
            if prune_by == "magnitude" and key == "exp_avg" and 0 < prune < 1:
                assert old[new == 0].abs().max() <= old[new != 0].abs().min()
    assert all(torch.equal(before["bias"][k], v) for k, v in states["bias"].items())
    assert optimizer.state_dict()["state"].keys() == {0, 1, 2}  # none for W₀


@pytest.mark.parametrize("restart", [False, True])
def test_the_step_counter_restarts_if_asked_to(restart: bool):
    model = started(restart_counter=restart)
    layer, optimizer = model["layer"], trained(model)
    revise_layers(model, optimizer, 5, seed=0)
    assert optimizer.state[layer.B.weight]["step"].item() == (0 if restart else 4)
    assert optimizer.state[layer.bias]["step"].item() == 4


def test_steps_that_are_no_multiple_change_nothing():
    model = started()
    optimizer = trained(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    revise_layers(model, optimizer, 6, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_frozen_weight_has_no_gradient_and_counts_none():
    layer = started()["layer"]
    gradients(layer)
    assert layer.weight.grad is None
    product, factors = 2 * 48 * 40, 2 * 8 * (48 + 40)
    assert layer.flops(3) == 3 * (product + factors)
    assert layer.training_flops(3) == 3 * (2 * product + 3 * factors)


def test_it_starts_from_any_dense_layer():
    weight, bias = torch.randn(6, 9), torch.randn(6)
    layer, x = ReLoRALinear.from_dense(weight, 2, bias), torch.randn(4, 9)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=0, atol=0)
    assert torch.equal(layer.dense_weight(), weight)
