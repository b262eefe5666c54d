"""Fira against the formulas in float64, and its limiter."""

import pytest
import torch
from test_galore import GAP, RANK, STEPS, leading
from toy import COMMON, SHAPES, Matrices, adam, decayed, gradients, in_parts, stepped

from lrtrain.optim.adamw import AdamW
from lrtrain.optim.fira import Fira, fira_step
from lrtrain.optim.projections import svd_basis
from lrtrain.optim.scaling import limit_growth

SETTINGS = {
    "rank": RANK,
    "gap": GAP,
    "scale": 0.25,
    "basis": "svd",
    "residual": "paper",
    "max_growth": 1.01,
}


@pytest.mark.parametrize("residual, removed", [("paper", 1.0), ("code", 0.25)])
@pytest.mark.parametrize("eps_convention", ["corrected", "galore"])
def test_it_is_fira(residual: str, removed: float, eps_convention: str):
    own = SETTINGS | {"residual": residual}
    found = stepped(lambda model: Fira(model, **own, **COMMON | {"eps_convention": eps_convention}), STEPS)
    limited = []
    for place, (m, n) in enumerate(SHAPES):
        w, first, second = found[0][place], torch.zeros(m, RANK).double(), torch.zeros(m, RANK).double()
        before = None
        for t, g in enumerate(gradients(m, n, STEPS, place), 1):
            if t in (1, 1 + place, 5 + place):
                p = leading(g, RANK)
            first, second, u, correction = adam(g @ p, first, second, t, eps_convention)
            phi = u.norm(dim=1) / ((g @ p).norm(dim=1) + 1e-8)
            scaled = phi[:, None] * (g - removed * g @ p @ p.T)
            if before is not None:
                over = max(float(scaled.norm()) / before, 1.01) / 1.01
                limited.append(over > 1)
                scaled = scaled / over
            before = float(scaled.norm())
            w = decayed(w, correction * (0.25 * u @ p.T + scaled))
        assert (found[-1][place] - w).norm() < 1e-3 * (w - found[0][place]).norm()
    assert any(limited) and not all(limited)


def test_the_norm_grows_by_a_hundredth_at_the_most():
    """Gradients that grow tenfold and fall back; shrinking is free, and so is growth from nothing."""
    norm = torch.zeros(())
    before = 0.0
    for size in (0.0, 3.0, 30.0, 1.0, 1.005, 300.0):
        given = torch.full((4, 4), size)
        limited = limit_growth(given.clone(), norm, 1.01, 1.0, lambda part: part)
        assert float(limited.norm()) == pytest.approx(float(norm))
        if before:
            assert float(norm) == pytest.approx(min(float(given.norm()), 1.01 * before))
        else:
            assert float(norm) == float(given.norm())
        before = float(norm)


def test_rows_in_parts_step_as_the_whole():
    """Norms are of all parts together, one of which has no rows."""
    g = gradients(20, 16, 1)[0].float()
    p = svd_basis(g, 4, lambda part: part)
    u = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))

    def step(rows: torch.Tensor, total) -> torch.Tensor:
        g, u = rows.split([16, 4], dim=1)
        return fira_step(g.clone(), p, g @ p, u, torch.tensor(0.5), 0.25, 1.0, 1.01, 0.7, total)

    whole = in_parts(step, torch.cat([g, u], 1), [20])
    parts = in_parts(step, torch.cat([g, u], 1), [11, 9, 0])
    torch.testing.assert_close(torch.cat(parts), whole[0])
    outside = whole[0] - whole[0] @ p @ p.T
    assert float(outside.norm()) == pytest.approx(1.01 * 0.5 * 0.7, rel=1e-4)  # so the limit held


def test_state_is_that_of_galore_and_a_norm():
    model = Matrices([(2048, 5461)], device="meta")
    optimizer = Fira(model, **SETTINGS | {"rank": 0.25}, **COMMON)
    assert optimizer.state_bytes() == 4 * (2 * 2048 + 5461) * 512 <= 0.45 * AdamW(model, **COMMON).state_bytes()
    assert [key for key, value in [*optimizer.state.values()][0].items() if not value.ndim] == ["step", "norm"]
