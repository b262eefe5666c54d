"""Trion against the formulas in float64, and against Muon where they coincide."""

from typing import Any

import pytest
import torch
from test_dct import dct_matrix
from test_muon import SCALES, iterated
from toy import COMMON, SHAPES, Matrices, decayed, gradients, stepped

from lrtrain.errors import ConfigError
from lrtrain.optim.muon import Muon
from lrtrain.optim.trion import Trion

SETTINGS: dict[str, Any] = {"rank": 5, "norm": "l1", "momentum": 0.95, "adjust": "match_rms_adamw"}
SETTINGS["orthogonalization"] = "polar_express"
STEPS = 6


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("adjust", SCALES)
@pytest.mark.parametrize("name", ["polar_express", "quintic"])
def test_it_is_trion(norm: str, adjust: str, name: str):
    own = SETTINGS | {"norm": norm, "adjust": adjust, "orthogonalization": name}
    found = stepped(lambda model: Trion(model, **own, **COMMON), STEPS)
    for place, (m, n) in enumerate(SHAPES):
        w, momentum, basis = found[0][place], torch.zeros(m, n, dtype=torch.float64), dct_matrix(n)
        for g in gradients(m, n, STEPS, place):
            momentum = momentum + g
            scores = torch.linalg.vector_norm(momentum @ basis, ord=1 if norm == "l1" else 2, dim=0)
            d = basis[:, scores.argsort(descending=True)[:5]]
            part = momentum @ d
            momentum = momentum - 0.05 * part @ d.T
            w = decayed(w, SCALES[adjust](m, n) * iterated(part, name) @ d.T)
        assert (found[-1][place] - w).norm() < 1e-3 * (w - found[0][place]).norm()


def test_with_all_columns_it_is_muon_without_nesterov():
    whole = stepped(lambda model: Trion(model, **SETTINGS | {"rank": 1.0}, **COMMON), STEPS)
    own = {"momentum": 0.95, "nesterov": False, "adjust": "match_rms_adamw", "orthogonalization": "polar_express"}
    muon = stepped(lambda model: Muon(model, **own, **COMMON), STEPS)
    for place, (m, n) in enumerate(SHAPES):
        way = (muon[-1][place] - muon[0][place]).norm()
        gap = (whole[-1][place] - muon[-1][place]).norm()
        assert (gap < 1e-3 * way) == (m >= n)  # a wide matrix has more columns than the largest rank


def test_what_the_columns_leave_out_stays_in_the_momentum():
    model = Matrices([(12, 8)])
    optimizer = Trion(model, **SETTINGS | {"rank": 2}, **COMMON)
    (p,) = model.parameters()
    basis = dct_matrix(8).float()
    p.grad = torch.randn(12, 2) @ basis[:, :2].T + 0.1 * torch.randn(12, 1) @ basis[:, 5:6].T
    given = p.grad @ basis
    optimizer.step()
    kept = optimizer.state[p]["momentum"] @ basis
    torch.testing.assert_close(kept[:, :2], 0.95 * given[:, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(kept[:, 2:], given[:, 2:], rtol=0, atol=1e-5)
    share = given[:, :2].square().sum() / given.square().sum()
    assert optimizer.captured_energy() == {"layers.0.weight": pytest.approx(share.item(), rel=1e-5)}


def test_state_is_the_momentum_and_a_rank_above_the_smaller_side_is_refused():
    assert Trion(Matrices(device="meta"), **SETTINGS, **COMMON).state_bytes() == sum(4 * m * n for m, n in SHAPES)
    with pytest.raises(ConfigError, match=r"optim.rank=19 is not between 1 and min\(in, out\)=18 of layers.2.weight"):
        Trion(Matrices(), **SETTINGS | {"rank": 19}, **COMMON)
