"""GaLore against the formulas in float64, against AdamW where they coincide, and in bytes."""

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import COMMON, SHAPES, Matrices, adam, decayed, gradients, stepped

from lrtrain.errors import ConfigError
from lrtrain.optim.adamw import AdamW
from lrtrain.optim.galore import GaLore

GAP, STEPS, RANK = 4, 7, 5
SETTINGS = {"rank": RANK, "gap": GAP, "scale": 0.25, "basis": "svd"}


def leading(g: Tensor, rank: int) -> Tensor:
    v = torch.from_numpy(np.linalg.svd(g.numpy())[2][:rank].T.copy())
    return v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()


@pytest.mark.parametrize("basis, most", [("svd", 1e-3), ("randomized", 1e-2)])
@pytest.mark.parametrize("eps_convention", ["corrected", "galore"])
def test_it_is_galore(basis: str, most: float, eps_convention: str):
    """Seven steps with a basis for all at the first, and then one matrix's at a time."""
    own = SETTINGS | {"basis": basis}
    found = stepped(lambda model: GaLore(model, **own, **COMMON | {"eps_convention": eps_convention}), STEPS)
    for place, (m, n) in enumerate(SHAPES):
        w, first, second = found[0][place], torch.zeros(m, RANK).double(), torch.zeros(m, RANK).double()
        for t, g in enumerate(gradients(m, n, STEPS, place), 1):
            if t in (1, 1 + place, 5 + place):
                p = leading(g, RANK)
            first, second, u, correction = adam(g @ p, first, second, t, eps_convention)
            w = decayed(w, correction * 0.25 * u @ p.T)
        assert (found[-1][place] - w).norm() < most * (w - found[0][place]).norm()


def test_with_the_identity_as_basis_it_is_adamw():
    class Whole(GaLore):
        def new_state(self, p: Tensor) -> dict[str, Tensor]:
            moments = {key: torch.zeros(p.shape) for key in ("first", "second")}
            return moments | {"basis": torch.eye(p.shape[1])}

        def compute_basis(self, p: Tensor, gradient: Tensor, rank: int, step: int) -> Tensor:
            return torch.eye(p.shape[1])

    projected = stepped(lambda model: Whole(model, **SETTINGS | {"scale": 1.0}, **COMMON), 5)
    for found, expected in zip(projected[-1], stepped(lambda model: AdamW(model, **COMMON), 5)[-1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_bases_change_in_turns_and_stay_orthonormal():
    torch.manual_seed(0)
    model = Matrices([(8, 8)] * 6)
    optimizer = GaLore(model, **SETTINGS | {"rank": 0.25}, **COMMON)
    weights = [*model.parameters()]
    for step in range(1, 10):
        before = [optimizer.state[p]["basis"].clone() for p in weights]
        for p in weights:
            p.grad = torch.randn(8, 8)
        optimizer.step()
        bases = [optimizer.state[p]["basis"] for p in weights]
        changed = [i for i, (a, b) in enumerate(zip(before, bases, strict=True)) if not torch.equal(a, b)]
        assert changed == ([*range(6)] if step == 1 else [i for i in range(6) if i % GAP == (step - 1) % GAP])
        for basis in bases:
            torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("m, n", [(2048, 2048), (5461, 2048), (2048, 5461)])
def test_state_is_less_than_half_of_adamws(m: int, n: int):
    model = Matrices([(m, n)], device="meta")
    optimizer = GaLore(model, **SETTINGS | {"rank": 0.25}, **COMMON)
    assert optimizer.state_bytes() == 4 * (2 * m + n) * 512
    assert optimizer.state_bytes(4) == 2 * m * 512 + 4 * n * 512  # the basis is whole on each process
    assert optimizer.state_bytes() <= 0.45 * AdamW(model, **COMMON).state_bytes()


@pytest.mark.parametrize(
    "own, said",
    [
        ({"rank": 18}, "optim.rank=18 is not below min(in, out)=18 of layers.2.weight"),
        ({"rank": 0}, "optim.rank=0 is not between 1 and min(in, out)=24 of layers.0.weight"),
        ({"rank": 1.0}, "optim.rank=1.0 is not below min(in, out)=24 of layers.0.weight"),
    ],
)
def test_what_cannot_be_is_refused(own: dict, said: str):
    with pytest.raises(ConfigError) as error:
        GaLore(Matrices(), **SETTINGS | COMMON | own)
    assert said in str(error.value)


def test_a_share_below_one_always_works():
    optimizer = GaLore(Matrices([(1, 5), (3, 7), (9, 2)]), **SETTINGS | {"rank": 0.4}, **COMMON)
    assert [state["basis"].shape[1] for state in optimizer.state.values()] == [1, 1, 1]
