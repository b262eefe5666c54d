"""Batches of matrices are stepped as each of the matrices would be by itself."""

import pytest
import torch
from factored import lowrank
from launching import SMALL
from torch import Tensor, nn
from toy import gradients

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.layers.experts import FactorizedExperts
from lrtrain.layers.lowrank import LowRankLinear
from lrtrain.optim import galore, spectron
from lrtrain.optim.base import ShardedOptimizer

EXPERTS, SHAPE, STEPS = 3, (72, 60), 5  # enough entries for eight bits
NAMES = ["adamw", "adamw8bit", "apollo", "apollo_mini", "dct_adamw", "fira", "galore", "muon", "trion"]


class Batched(nn.Module):
    """A block of one batch, kept as (out, in) or (in, out)."""

    def __init__(self, weights: Tensor, is_transposed: bool):
        super().__init__()
        block = nn.Module()
        block.is_transposed = is_transposed
        block.gate_up_proj = nn.Parameter(weights.mT.contiguous() if is_transposed else weights.clone())
        self.blocks = nn.ModuleList([block])

    @property
    def batch(self) -> nn.Parameter:
        return self.blocks[0].gate_up_proj

    def matrices(self) -> list[Tensor]:
        return [*(self.batch.mT if self.blocks[0].is_transposed else self.batch)]


class Separate(nn.Module):
    """The same matrices as plain linears."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in weights])
        for linear, weight in zip(self.blocks, weights, strict=True):
            linear.weight.data = weight.clone()


def optimizer(name: str, model: nn.Module, *overrides: str) -> ShardedOptimizer:
    settings = ["optim.lr=1e-2", "optim.weight_decay=0.1"]
    return choice(compose(*SMALL, f"optim={name}", *settings, *overrides).optim)(model)


@pytest.fixture(autouse=True)
def draws_without_names(monkeypatch):
    """Random starts are functions of names, which here differ."""
    for module in (galore, spectron):
        monkeypatch.setattr(module, "generator_for", lambda *_: torch.Generator().manual_seed(0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_steps_as_its_matrices_do(name: str, transposed: bool):
    weights = torch.randn(EXPERTS, *SHAPE, generator=torch.Generator().manual_seed(0))
    batched, separate = Batched(weights, transposed), Separate(weights)
    ours, theirs = optimizer(name, batched), optimizer(name, separate)
    given = [gradients(*SHAPE, STEPS, seed) for seed in range(EXPERTS)]
    given[1][0].zero_()  # an expert without tokens in the first step
    for step in range(STEPS):
        grad = torch.stack([of[step] for of in given]).float()
        batched.batch.grad = grad.mT.contiguous() if transposed else grad.clone()
        for linear, own in zip(separate.blocks, grad, strict=True):
            linear.weight.grad = own.clone()
        ours.step()
        theirs.step()
    exact = {"rtol": 0, "atol": 0} if name != "adamw" else {"rtol": 1e-6, "atol": 1e-7}  # a fused kernel's vector width
    for got, linear in zip(batched.matrices(), separate.blocks, strict=True):
        torch.testing.assert_close(got, linear.weight, **exact)
    assert ours.state_bytes() == pytest.approx(theirs.state_bytes(), abs=64 * EXPERTS)


class Factored(nn.Module):
    """A block of factorized experts, or of as many layers of their own."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(layers)


def pairs() -> tuple[FactorizedExperts, list[LowRankLinear]]:
    single = [lowrank(33, 20, 5, bias=False) for _ in range(EXPERTS)]
    for i, layer in enumerate(single):
        layer.load_state_dict(layer.init_parameters(torch.Generator().manual_seed(i)))
    batched = FactorizedExperts(lowrank(33, 20, 5, bias=False).to("meta"), EXPERTS, 1, False).to_empty(device="cpu")
    batched.load_state_dict({k: torch.stack([m.state_dict()[k] for m in single]) for k in single[0].state_dict()})
    return batched, single


@pytest.mark.parametrize("name,settings", [
    ("spectron", []),
    ("preconditioned_adamw", ["optim.damping=1e-3"]),
    ("muon", []),
    ("adamw", ["optim.lr_ratio=4"]),
])  # fmt: skip
@pytest.mark.parametrize("in_backward", [False, True])
def test_batches_of_factors_step_as_their_pairs_do(name: str, settings: list[str], in_backward: bool):
    batched, single = pairs()
    models = Factored(batched), Factored(*single)
    ours, theirs = (optimizer(name, model, *settings) for model in models)
    dice = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for key, p in batched.named_parameters():
            p.grad = torch.randn(p.shape, generator=dice)
            for layer, own in zip(single, p.grad, strict=True):
                layer.get_parameter(key).grad = own.clone()
        for of in (ours, theirs):
            if not in_backward:
                of.step()
                continue
            of.begin_step()
            for group in of.param_groups:
                for p in group["params"]:
                    of.step_one(p, group)
    for key, p in batched.named_parameters():
        for layer, own in zip(single, p, strict=True):
            # To the last bits: how BLAS sums depends on where in memory a matrix begins.
            torch.testing.assert_close(own, layer.get_parameter(key), rtol=1e-5, atol=2e-7)


def test_loro_refuses_batches_of_factors():
    batched, _ = pairs()
    with pytest.raises(ConfigError, match=r"optim=loro.*blocks\.0.*param\.pattern"):
        optimizer("loro", Factored(batched))
