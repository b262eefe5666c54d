"""What all optimizers share, against formulas in float64: ε's convention, what decays, and the parameters they leave to
AdamW."""

import pytest
import torch
from factored import Model, gradient, set_gradients
from launching import OPTIM, SMALL
from torch import Tensor, nn

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.optim.adamw import AdamW

OPTIMIZERS = ("adamw", "galore", "fira", "apollo", "muon", "dct_adamw", "loro", "spectron", "preconditioned_adamw")


def published_adam(w: Tensor, gradients: list[Tensor], lr: float, eps: float, convention: str) -> Tensor:
    """Adam's steps in float64; `galore`: as transformers' former AdamW, from which GaLore, Fira, APOLLO and LORO have
    theirs: step lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) along M/(√V + ε)."""
    b1, b2 = 0.9, 0.999
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if convention == "galore":
            w = w - lr * (1 - b2**t) ** 0.5 / (1 - b1**t) * m / (v.sqrt() + eps)
        else:
            w = w - lr * m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("convention", ["corrected", "galore"])
def test_norms_and_biases_are_stepped_by_the_convention_too(optim: str, convention: str):
    """With gradients as small as ε the two differ several times over."""
    model = Model()
    model.norm.reset_parameters()
    others = [model.norm.weight, model.norm.bias]
    changes = [f"optim.eps_convention={convention}", "optim.eps=1e-6", "optim.lr=0.01", "param=lowrank"]
    optimizer = choice(compose(*SMALL, f"optim={optim}", *changes).optim)(model)
    before, given = [p.detach().double() for p in others], [[], []]
    for _ in set_gradients(model, 4):
        for p, seen in zip(others, given, strict=True):
            assert p.grad is not None
            p.grad *= 1e-6
            seen.append(gradient(p))
        optimizer.step()
    for p, w, seen in zip(others, before, given, strict=True):
        expected = published_adam(w, seen, 0.01, 1e-6, convention)
        torch.testing.assert_close(p.detach().double() - w, expected - w, rtol=2e-3, atol=1e-6)
        other = published_adam(w, seen, 0.01, 1e-6, "galore" if convention == "corrected" else "corrected")
        assert (other - expected).norm() > 0.3 * (expected - w).norm()


def test_decay_all_is_torchs_weight_decay_on_every_parameter():
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW(ours, **OPTIM | {"weight_decay": 0.3, "decay": "all"})
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.3)
    for _ in set_gradients(ours, 5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad
        optimizer.step()
        torchs.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_by_default_norms_and_biases_do_not_decay():
    model = Model()
    nn.init.ones_(model.norm.weight)
    optimizer = AdamW(model, **OPTIM | {"weight_decay": 0.3})
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model.norm.weight, torch.ones(7))
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
