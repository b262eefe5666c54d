"""APOLLO and APOLLO-Mini against the formulas in float64, what their factors estimate, and their bytes."""

import math

import pytest
import torch
from toy import COMMON, SHAPES, Matrices, adam, decayed, gradients, in_parts, stepped

from lrtrain.core.seeds import integer_seed
from lrtrain.optim.adam import adam_direction
from lrtrain.optim.adamw import AdamW
from lrtrain.optim.apollo import Apollo
from lrtrain.optim.projections import gaussian_basis, sparse_basis
from lrtrain.optim.scaling import matrix_factor, row_factors

GAP, STEPS = 3, 7
SETTINGS = {
    "rank": 5,
    "gap": GAP,
    "scale": 2.0,
    "factors": "channel",
    "basis": "gaussian",
    "max_growth": 1.01,
}


@pytest.mark.parametrize("factors, rank", [("channel", 5), ("tensor", 1)])
@pytest.mark.parametrize("max_growth", [1.01, None])
@pytest.mark.parametrize("basis, drawn", [("gaussian", gaussian_basis), ("sparse", sparse_basis)])
@pytest.mark.parametrize("eps_convention", ["corrected", "galore"])
def test_it_is_apollo(factors: str, rank: int, max_growth: float | None, basis: str, drawn, eps_convention: str):
    """Seven steps on three bases; the scale's root comes after the limit, which is the same."""
    own = {"factors": factors, "rank": rank, "basis": basis, "max_growth": max_growth}
    settings = SETTINGS | own | COMMON | {"eps_convention": eps_convention}
    found = stepped(lambda model: Apollo(model, **settings), STEPS)
    limited = []
    for place, (m, n) in enumerate(SHAPES):
        w, first, second = found[0][place], torch.zeros(m, rank).double(), torch.zeros(m, rank).double()
        before = None
        for t, g in enumerate(gradients(m, n, STEPS, place), 1):
            p = drawn(n, rank, integer_seed(0, f"basis {(t - 1) // GAP} of {n}×{rank}")).double()
            first, second, u, correction = adam(g @ p, first, second, t, eps_convention)
            dim = 1 if factors == "channel" else (0, 1)
            scaled = g * (u.norm(dim=dim, keepdim=True) / ((g @ p).norm(dim=dim, keepdim=True) + 1e-8))
            if before is not None and max_growth is not None:
                over = max(float(scaled.norm()) / before, 1.01) / 1.01
                limited.append(over > 1)
                scaled = scaled / over
            before = float(scaled.norm())
            w = decayed(w, correction * math.sqrt(2.0) * scaled)
        assert (found[-1][place] - w).norm() < 1e-4 * (w - found[0][place]).norm()
    assert max_growth is None or (any(limited) and not all(limited))


@pytest.mark.parametrize("r", [4, 32, 128])
def test_factors_are_those_of_adam_times_the_root_of_r_over_n(r: int):
    """Entries of Adam's step on noise have one size whatever is projected, so ‖u‖ is √(r/n) times as large; ‖g‖ is not.

    At the first step Adam's entries are signs, so the ratio is √(r/n) ‖G_i‖ / ‖g_i‖ exactly.
    """
    m, n = 300, 256
    dice = torch.Generator().manual_seed(0)
    basis = gaussian_basis(n, r, 1)
    states = [torch.zeros(2, m, r), torch.zeros(2, m, n)]
    for step in range(1, 31):
        gradient = torch.randn(m, n, generator=dice)
        pairs = [(gradient @ basis, states[0]), (gradient, states[1])]
        adams = [(adam_direction(g, *s, step, 0.9, 0.99, 0.0), g) for g, s in pairs]
        ratio = row_factors(*adams[0]) / row_factors(*adams[1])
        if step == 1:
            expected = math.sqrt(r / n) * gradient.norm(dim=1) / (gradient @ basis).norm(dim=1)
            torch.testing.assert_close(ratio[:, 0], expected)
    of_matrix = [matrix_factor(*pair, lambda part: part) for pair in adams]
    assert float(of_matrix[0] / of_matrix[1]) == pytest.approx(math.sqrt(r / n), rel=0.05)
    norms = (adams[0][0].square().mean() / adams[1][0].square().mean()).sqrt()  # entries are of one size
    assert float(norms) == pytest.approx(1, rel=0.05)
    if r > 4:  # 1/‖g_i‖ and ‖u_i‖ scatter, and their product's mean is not the mean's
        assert float(ratio.mean()) == pytest.approx(math.sqrt(r / n), rel=0.05)


def test_rows_in_parts_have_the_factors_of_the_whole():
    pair = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))

    def factor(rows: torch.Tensor, total) -> torch.Tensor:
        return matrix_factor(rows[:, :4], rows[:, 4:], total)

    whole = pair[:, :4].norm() / pair[:, 4:].norm()
    for part in in_parts(factor, pair, [11, 9, 0]):
        torch.testing.assert_close(part, whole)


def test_matrices_of_one_shape_share_a_basis_that_is_not_saved():
    model = Matrices([(12, 16), (40, 16), (16, 40)])
    optimizer = Apollo(model, **SETTINGS | {"rank": 0.25}, **COMMON)
    assert [tuple(t.shape) for t in optimizer.shared()] == [(16, 3), (16, 4), (40, 4)]
    assert {key.rsplit(".", 1)[1] for key in optimizer.named_state()} == {"step", "first", "second", "norm"}
    optimizer = Apollo(model, **SETTINGS | {"rank": 3}, **COMMON)
    assert [tuple(t.shape) for t in optimizer.shared()] == [(16, 3), (40, 3)]


def test_a_run_in_halves_is_the_run_as_a_whole():
    """The second half begins within a gap, with a cache that holds nothing."""
    model, twin = Matrices(), Matrices()
    optimizer, fresh = (Apollo(each, **SETTINGS, **COMMON) for each in (model, twin))
    given = [gradients(*shape, STEPS, seed) for seed, shape in enumerate(SHAPES)]

    def step(which: int, of: torch.nn.Module, by: Apollo) -> None:
        for p, sequence in zip(of.parameters(), given, strict=True):
            p.grad = sequence[which].float()
        by.step()

    for t in range(5):
        step(t, model, optimizer)
    twin.load_state_dict(model.state_dict())
    for name, value in fresh.named_state().items():
        value.copy_(optimizer.named_state()[name])
    for t in range(5, STEPS):
        step(t, model, optimizer)
        step(t, twin, fresh)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("m, n", [(2048, 2048), (5461, 2048), (2048, 5461)])
def test_state_is_less_than_half_of_adamws(m: int, n: int):
    model = Matrices([(m, n)], device="meta")
    adamw = AdamW(model, **COMMON).state_bytes()
    optimizer = Apollo(model, **SETTINGS | {"rank": 0.25}, **COMMON)
    assert optimizer.state_bytes() == 4 * (2 * m + n) * 512 <= 0.45 * adamw
    mini = Apollo(model, **SETTINGS | {"rank": 1, "factors": "tensor"}, **COMMON)
    assert mini.state_bytes() == 4 * (2 * m + n) <= 0.002 * adamw
