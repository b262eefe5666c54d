"""Muon against the formulas in float64, against torch's, and its momentum bit by bit."""

from typing import Any

import pytest
import torch
from torch.optim import Muon as TorchMuon
from toy import COMMON, SHAPES, Matrices, decayed, gradients, stepped

from lrtrain.optim import orthogonal
from lrtrain.optim.muon import Muon

SETTINGS: dict[str, Any] = {
    "momentum": 0.95,
    "nesterov": True,
    "adjust": "match_rms_adamw",
    "orthogonalization": "polar_express",
}
STEPS = 6


JORDAN = (3.4445, -4.7750, 2.0315)
SCALES = {
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "jordan": lambda m, n: max(1.0, m / n) ** 0.5,
    "spectral": lambda m, n: (m / n) ** 0.5,
}


def iterated(x: torch.Tensor, name: str = "polar_express") -> torch.Tensor:
    """Newton–Schulz on the matrix itself, in its precision."""
    x = x / x.norm()
    for a, b, c in (JORDAN,) * 5 if name == "quintic" else orthogonal.ITERATIONS["polar_express"]:
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    return x


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", SCALES)
@pytest.mark.parametrize("name", ["polar_express", "quintic"])
def test_it_is_muon(nesterov: bool, adjust: str, name: str):
    own = SETTINGS | {"nesterov": nesterov, "adjust": adjust, "orthogonalization": name}
    found = stepped(lambda model: Muon(model, **own, **COMMON), STEPS)
    for place, (m, n) in enumerate(SHAPES):
        w, buffer = found[0][place], torch.zeros(m, n, dtype=torch.float64)
        for g in gradients(m, n, STEPS, place):
            buffer = 0.95 * buffer + 0.05 * g
            w = decayed(w, SCALES[adjust](m, n) * iterated(0.95 * buffer + 0.05 * g if nesterov else buffer, name))
        assert (found[-1][place] - w).norm() < 1e-3 * (w - found[0][place]).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("adjust", "torchs_name"), [("match_rms_adamw", "match_rms_adamw"), ("jordan", "original")])
def test_it_is_torchs_muon_were_that_in_float32(monkeypatch, nesterov: bool, adjust: str, torchs_name: str):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    settings = SETTINGS | {"nesterov": nesterov, "adjust": adjust, "orthogonalization": "quintic"}
    found = stepped(lambda model: Muon(model, **settings, **COMMON), STEPS)

    def torchs(model: torch.nn.Module) -> TorchMuon:
        own = {"weight_decay": COMMON["weight_decay"], "ns_coefficients": JORDAN, "adjust_lr_fn": torchs_name}
        return TorchMuon(model.parameters(), COMMON["lr"], momentum=0.95, nesterov=nesterov, **own)

    expected = stepped(torchs, STEPS)
    for place in range(len(SHAPES)):
        way = (expected[-1][place] - expected[0][place]).norm()
        assert (found[-1][place] - expected[-1][place]).norm() < 1e-3 * way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("method", [orthogonal.orthogonalize, orthogonal._orthogonalize_bfloat16])
def test_orthogonalization_leaves_the_momentum_as_it_is(monkeypatch, dtype, nesterov: bool, method):
    """Which torch's does not in plain form, where parameters are bfloat16."""
    model = Matrices().to(dtype)
    optimizer = Muon(model, **SETTINGS | {"nesterov": nesterov}, **COMMON)
    seen: list[torch.Tensor] = []

    def watched(x: torch.Tensor, rows, coefficients) -> torch.Tensor:
        buffer = next(s["momentum"] for p, s in optimizer.state.items() if optimizer.rows[p] is rows)
        seen.append(buffer.clone())
        return method(x, rows, coefficients)

    monkeypatch.setattr("lrtrain.optim.muon.orthogonalize", watched)
    expected = [torch.zeros(shape) for shape in SHAPES]
    for _ in range(3):
        for p, buffer in zip(model.parameters(), expected, strict=True):
            p.grad = torch.randn_like(p)
            buffer.lerp_(p.grad.float(), 1 - 0.95)
        optimizer.step()
        for p, before, buffer in zip(model.parameters(), seen[-3:], expected, strict=True):
            after = optimizer.state[p]["momentum"]
            assert after.dtype == torch.float32 and torch.equal(after, before) and torch.equal(after, buffer)


def test_a_wide_step_of_jordans_has_the_norm_one():
    """2048×5461: √max(1, m/n) is 1, where √(m/n) is 0.612."""
    scales = {name: orthogonal.ADJUSTMENTS[name](2048, 5461) for name in SCALES}
    assert scales == pytest.approx({"match_rms_adamw": 14.78, "jordan": 1.0, "spectral": 0.612}, rel=1e-3)


def test_steps_are_as_large_as_adamws():
    """The root mean square of a step on a full matrix is about 0.2 lr, at any shape."""
    torch.manual_seed(0)
    model = Matrices([(64, 64), (64, 16), (16, 64)])
    before = [p.detach().clone() for p in model.parameters()]
    undecayed: dict[str, Any] = COMMON | {"weight_decay": 0.0}
    optimizer = Muon(model, **SETTINGS, **undecayed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert (p - old).square().mean().sqrt().item() == pytest.approx(0.2 * COMMON["lr"], rel=0.15)


def test_state_is_one_number_per_entry():
    assert Muon(Matrices(device="meta"), **SETTINGS, **COMMON).state_bytes() == sum(4 * m * n for m, n in SHAPES)
