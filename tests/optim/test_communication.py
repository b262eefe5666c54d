"""What each optimizer sends to other processes in a step: no gradient is ever gathered to be projected."""

import pytest
import torch
from launching import SMALL
from torch import Tensor, nn

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.optim.rows import Rows

M, N = 40, 24  # of a matrix, and of a wide one the other way round
R = 6  # a quarter of the smaller side
FLOAT = 4


class Counted(Rows):
    """The rows of a process alone that counts the bytes which each of several would receive."""

    received = 0

    def sum(self, part: Tensor) -> Tensor:
        Counted.received += part.nbytes
        return part

    largest = sum

    def gather(self, rows: Tensor) -> Tensor:
        Counted.received += rows.nbytes
        return rows


def received(optim: str, m: int, n: int, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes in one step on one matrix (m, n), the `step`-th."""
    monkeypatch.setattr("lrtrain.optim.base.Rows", Counted)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(n, m, bias=False)])
    optimizer = choice(compose(*SMALL, f"optim={optim}").optim)(model)
    for _ in range(step):
        Counted.received = 0
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return Counted.received


SKETCH = FLOAT * (3 * N * (R + 8) + (R + 8) ** 2)  # three products with GᵀG, and the small matrix at the end
ZERO = FLOAT  # whether the first gradient is
NORM = FLOAT  # of the norm-growth limiter


@pytest.mark.parametrize(
    "optim, first, later",
    [
        ("adamw", 0, 0),
        ("adamw8bit", 0, 0),
        ("galore", ZERO + SKETCH, 0),
        ("fira", ZERO + SKETCH + NORM, NORM),
        ("apollo", NORM, NORM),
        ("apollo_mini", 2 * FLOAT + NORM, 2 * FLOAT + NORM),
        ("dct_adamw", ZERO + FLOAT * 2 * N, FLOAT * 2 * N),
        ("trion", FLOAT * (2 * N + R**2), FLOAT * (2 * N + R**2)),
        ("muon", FLOAT * N**2, FLOAT * N**2),
    ],
)
def test_bytes_of_a_tall_matrix(optim: str, first: int, later: int, monkeypatch: pytest.MonkeyPatch):
    assert received(optim, M, N, 1, monkeypatch) == first
    assert received(optim, M, N, 2, monkeypatch) == later


@pytest.mark.parametrize("optim", ["galore", "fira", "apollo", "apollo_mini", "dct_adamw", "trion"])
def test_a_wide_matrix_is_not_gathered_either(optim: str, monkeypatch: pytest.MonkeyPatch):
    assert received(optim, N, M, 2, monkeypatch) <= FLOAT * (2 * M + R**2)


def test_muon_gathers_wide_matrices_once(monkeypatch: pytest.MonkeyPatch):
    assert received("muon", N, M, 2, monkeypatch) == FLOAT * M * N
