"""Subspaces that are kept for many steps are never those of a gradient of zeros, which A has where B = 0."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from toy import COMMON, Matrices, gradients

from lrtrain.engine.revision import revise_layers
from lrtrain.layers.relora import ReLoRALinear
from lrtrain.linalg.dct import dct
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.dct_adamw import DctAdamW
from lrtrain.optim.dct_columns import DctOptimizer, top_columns
from lrtrain.optim.fira import Fira
from lrtrain.optim.galore import GaLore
from lrtrain.optim.projections import svd_basis
from lrtrain.optim.trion import Trion

RANK = 2
GALORE = {"gap": 200, "scale": 0.25, "basis": "randomized"}
OPTIMIZERS = {
    "galore": (GaLore, GALORE),
    "fira": (Fira, GALORE | {"residual": "paper", "max_growth": 1.01}),
    "dct_adamw": (DctAdamW, {"gap": 200, "norm": "l1", "rotate": True, "error_feedback": "full"}),
    "trion": (Trion, {"norm": "l1", "momentum": 0.95, "adjust": "spectral", "orthogonalization": "quintic"}),
}
KEPT_FOR_LONG = [name for name, (_, own) in OPTIMIZERS.items() if "gap" in own]


def made(optim: str, model: nn.Module) -> ShardedOptimizer:
    cls, own = OPTIMIZERS[optim]
    return cls(model, **own, **COMMON | {"rank": RANK, "weight_decay": 0.0})


class Pair(nn.Module):
    """One ReLoRA layer, merged every two steps."""

    def __init__(self):
        super().__init__()
        own = {"merge_every": 2, "alpha": 8.0, "scale": "const", "prune": 0.9, "prune_by": "random"}
        layer = ReLoRALinear(20, 16, False, 6, **own, restart_counter=False, init_std=0.02)
        layer.load_state_dict(layer.init_parameters(torch.Generator().manual_seed(0)))
        self.layers = nn.ModuleList([layer])

    def step(self, optimizer: ShardedOptimizer, seed: int) -> Tensor:
        """One on random inputs and outputs; returns the gradient of A."""
        dice = torch.Generator().manual_seed(seed)
        optimizer.zero_grad()
        error = self.layers[0](torch.randn(50, 20, generator=dice)) - torch.randn(50, 16, generator=dice)
        error.square().sum().backward()
        found = cast(Tensor, self.factor.grad).clone()
        optimizer.step()
        return found

    @property
    def factor(self) -> Tensor:
        return cast(ReLoRALinear, self.layers[0]).A.weight


def most_kept(optim: str, gradient: Tensor) -> Tensor:
    """The norm of what the best subspace for a gradient keeps of it."""
    if optim == "dct_adamw":
        spectrum = dct(gradient)
        return spectrum[:, top_columns(spectrum.abs().sum(0), RANK)].norm()
    return (gradient @ svd_basis(gradient, RANK, lambda part: part)).norm()


@pytest.mark.parametrize("optim", KEPT_FOR_LONG)
def test_a_beside_a_b_of_zeros_begins_in_the_subspace_of_its_first_gradient(optim: str):
    """At the start and after a merge, in the middle of the run."""
    model = Pair()
    optimizer = made(optim, model)
    for done in (0, 2):
        start = model.factor.detach().clone()
        assert not model.step(optimizer, done).any() and torch.equal(model.factor, start)
        gradient = model.step(optimizer, done + 1)
        moment = optimizer.state[model.factor]["first"] / (1 - optimizer.beta1)  # the projected gradient
        torch.testing.assert_close(moment.norm(), most_kept(optim, gradient), rtol=0.01, atol=0)
        assert revise_layers(model, optimizer, done + 2, seed=0)


@pytest.mark.parametrize("zeros", [1, 5])
@pytest.mark.parametrize("optim", KEPT_FOR_LONG)
def test_steps_by_gradients_of_zeros_leave_no_trace(optim: str, zeros: int):
    def trained(leading: int) -> list[Tensor]:
        torch.manual_seed(0)
        model = Matrices([(18, 24)])
        optimizer = made(optim, model)
        (p,) = model.parameters()
        for g in [torch.zeros(18, 24)] * leading + gradients(18, 24, 4):
            p.grad = g.float()
            optimizer.step()
        return [p.detach(), *(value for value in optimizer.state[p].values())]

    assert all(map(torch.equal, trained(zeros), trained(0)))


@pytest.mark.parametrize("optim", ["dct_adamw", "trion"])
def test_the_captured_energy_of_a_gradient_of_zeros_is_not_counted(optim: str):
    model = Pair()
    optimizer = cast(DctOptimizer, made(optim, model))
    model.step(optimizer, 0)
    assert optimizer.captured_energy().keys() == {"layers.0.B.weight"}
    assert 0 < optimizer.metrics()["captured_energy"] < 1
    model.step(optimizer, 1)
    assert optimizer.captured_energy().keys() == {"layers.0.A.weight", "layers.0.B.weight"}
