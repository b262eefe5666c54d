"""DCT-AdamW against the formulas in float64, against AdamW where they coincide, its error feedback, and its bytes."""

from typing import Any

import pytest
import torch
from test_dct import dct_matrix
from torch import Tensor
from toy import COMMON, SHAPES, Matrices, adam, decayed, gradients, stepped

from lrtrain.errors import ConfigError
from lrtrain.optim import dct_adamw
from lrtrain.optim.adamw import AdamW
from lrtrain.optim.dct_adamw import DctAdamW, stored_error

SETTINGS: dict[str, Any] = {"rank": 5, "norm": "l1", "gap": 1, "rotate": True, "error_feedback": "none"}
STEPS = 7


@pytest.mark.parametrize("feedback", ["none", "full"])
@pytest.mark.parametrize("norm, gap, rotate", [("l1", 1, True), ("l2", 3, True), ("l1", 2, False)])
def test_it_is_dct_adamw(norm: str, gap: int, rotate: bool, feedback: str):
    own = SETTINGS | {"norm": norm, "gap": gap, "rotate": rotate, "error_feedback": feedback}
    found = stepped(lambda model: DctAdamW(model, **own, **COMMON), STEPS)
    for place, (m, n) in enumerate(SHAPES):
        w, error = found[0][place], torch.zeros(m, n, dtype=torch.float64)
        first, second = torch.zeros(m, 5).double(), torch.zeros(m, 5).double()
        basis, columns = dct_matrix(n), torch.arange(5)
        for t, g in enumerate(gradients(m, n, STEPS, place), 1):
            total = g + error if feedback == "full" else g
            if t % gap == 1 % gap:
                scores = torch.linalg.vector_norm(total @ basis, ord=1 if norm == "l1" else 2, dim=0)
                new = scores.argsort(descending=True)[:5].sort().values
                if rotate:
                    rotation = (columns[:, None] == new).double()
                    first, second = first @ rotation, second @ rotation
                columns = new
            d = basis[:, columns]
            error = total - total @ d @ d.T
            first, second, u, correction = adam(total @ d, first, second, t, "corrected")
            w = decayed(w, correction * u @ d.T)
        assert (found[-1][place] - w).norm() < 1e-3 * (w - found[0][place]).norm()


def test_columns_change_every_gap_steps():
    model = Matrices([(16, 16)])
    optimizer = DctAdamW(model, **SETTINGS | {"gap": 3}, **COMMON)
    (p,) = model.parameters()
    changed = []
    for step in range(1, 9):
        before = optimizer.state[p]["columns"].clone()
        p.grad = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if not torch.equal(optimizer.state[p]["columns"], before):
            changed.append(step)
    assert changed == [1, 4, 7]


def test_with_all_columns_it_is_adamw_in_the_rotated_basis():
    """Steps of AdamW on W D, whose gradient is G D."""
    found = stepped(lambda model: DctAdamW(model, **SETTINGS | {"rank": 1.0, "rotate": False}, **COMMON), STEPS)
    for place, (m, n) in enumerate(SHAPES[:2]):
        basis = dct_matrix(n)
        w = (found[0][place] @ basis).float().requires_grad_()
        group = {"lr": COMMON["lr"], "betas": COMMON["betas"], "eps": COMMON["eps"]}
        torchs = torch.optim.AdamW([w], weight_decay=COMMON["weight_decay"], **group)
        for g in gradients(m, n, STEPS, place):
            w.grad = (g @ basis).float()
            torchs.step()
        assert (found[-1][place] @ basis - w.detach()).norm() < 1e-3 * w.detach().norm() * COMMON["lr"]


def test_with_the_identity_for_a_basis_it_is_adamw(monkeypatch):
    def placed(part: Tensor, columns: Tensor, n: int) -> Tensor:
        return part.new_zeros(len(part), n).index_copy_(1, columns, part)

    monkeypatch.setattr(dct_adamw, "dct", Tensor.clone)
    monkeypatch.setattr(dct_adamw, "lift", placed)
    found = stepped(lambda model: DctAdamW(model, **SETTINGS | {"rank": 1.0}, **COMMON), STEPS)
    expected = stepped(lambda model: AdamW(model, **COMMON), STEPS)
    for place in range(2):  # of the third, which is wide, not all columns can be taken
        torch.testing.assert_close(found[-1][place], expected[-1][place], atol=1e-6, rtol=0)


@pytest.mark.parametrize("feedback, bits", [("full", 32), ("8bit", 8), ("4bit", 4)])
def test_what_is_left_out_comes_back(feedback: str, bits: int):
    """E_t + up(a_t) = G_t + E_{t−1}, to half a gap where E is in codes; a_t is read off the first moment."""
    n = 41
    model = Matrices([(18, n)])
    optimizer = DctAdamW(model, **SETTINGS | {"error_feedback": feedback}, **COMMON)
    (p,) = model.parameters()
    basis = dct_matrix(n)
    for g in gradients(18, n, STEPS):
        state = optimizer.state[p]
        before = stored_error(state, bits, n).double().clone()
        old, moment = state["columns"].clone(), state["first"].double().clone()
        p.grad = g.float()
        optimizer.step()
        columns = state["columns"]
        kept = moment @ (old[:, None] == columns).double()
        part = (state["first"].double() - 0.9 * kept) / 0.1
        gap = (stored_error(state, bits, n) + part @ basis[:, columns].T - (g + before)).abs()
        most = 1e-5 if bits == 32 else 0.501 * state["error_gap"][:, None] + 1e-5
        assert (gap <= most).all()
        assert before.abs().sum() + stored_error(state, bits, n).abs().sum() > 0


def test_the_captured_share_is_that_of_the_last_choice():
    model = Matrices([(12, 8)])
    optimizer = DctAdamW(model, **SETTINGS | {"rank": 2, "norm": "l2", "gap": 2}, **COMMON)
    assert optimizer.captured_energy() == {}
    (p,) = model.parameters()
    first, second = torch.randn(12, 8), torch.randn(12, 8)
    for g in (first, second):
        p.grad = g.clone()
        optimizer.step()
    energies = (first.double() @ dct_matrix(8)).square().sum(0).sort(descending=True).values
    share = (energies[:2].sum() / energies.sum()).item()
    assert optimizer.captured_energy() == {"layers.0.weight": pytest.approx(share, rel=1e-5)}


def test_gradients_that_are_zero_or_constant_give_finite_steps():
    for feedback in ("none", "full", "8bit", "4bit"):
        model = Matrices()
        optimizer = DctAdamW(model, **SETTINGS | {"error_feedback": feedback}, **COMMON)
        for value in (0.0, 1.0):
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("feedback", ["none", "full", "8bit", "4bit"])
def test_bytes_of_state(feedback: str):
    model = Matrices(device="meta")
    optimizer = DctAdamW(model, **SETTINGS | {"error_feedback": feedback}, **COMMON)
    expected = 0
    for m, n in SHAPES:
        error = {"none": 0, "full": 4 * m * n, "8bit": m * n + 8 * m, "4bit": m * -(-n // 2) + 8 * m}[feedback]
        expected += 2 * 4 * m * 5 + 8 * 5 + error
    assert optimizer.state_bytes() == expected


@pytest.mark.parametrize("m, n", [(2048, 2048), (5461, 2048), (2048, 5461)])
def test_state_is_less_than_half_of_adamws(m: int, n: int):
    def held(cls, **own: Any) -> int:
        return cls(Matrices([(m, n)], "meta"), **own, **COMMON).state_bytes()

    assert held(DctAdamW, **SETTINGS | {"rank": 0.25}) <= 0.45 * held(AdamW)


def test_a_rank_above_the_smaller_side_is_refused():
    with pytest.raises(ConfigError, match=r"optim.rank=19 is not between 1 and min\(in, out\)=18 of layers.2.weight"):
        DctAdamW(Matrices(), **SETTINGS | {"rank": 19}, **COMMON)
