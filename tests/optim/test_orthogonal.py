"""Newton–Schulz iteration in the space of Gram matrices, and power iteration, against float64 references."""

from typing import cast

import pytest
import torch
from torch import Tensor

from lrtrain.optim.orthogonal import ITERATIONS, _orthogonalize_bfloat16, orthogonalize, spectral_norm
from lrtrain.optim.rows import Rows

F64 = torch.float64
POLAR = ITERATIONS["polar_express"]
SHAPES = [(96, 64), (48, 48), (40, 72), (61, 7), (1, 9), (9, 1)]
SPECTRA = {
    "geometric": lambda k: torch.logspace(0, -4, k, dtype=F64),
    "one large": lambda k: torch.cat([torch.ones(1, dtype=F64), torch.full((k - 1,), 1e-4, dtype=F64)]),
    "deficient": lambda k: (torch.arange(k) < max(1, k // 3)).double(),
    "flat": lambda k: torch.ones(k, dtype=F64),
    "zero": lambda k: torch.zeros(k, dtype=F64),
}


def with_spectrum(m: int, n: int, sigma: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    u, _, vh = torch.linalg.svd(torch.randn(m, n, generator=generator, dtype=F64), full_matrices=False)
    return (u * sigma) @ vh


def reference(x: Tensor, name: str = "polar_express") -> Tensor:
    """The iteration as published, on the matrix itself: X ← aX + bXXᵀX + cXXᵀXXᵀX."""
    x = x / x.norm().clamp_min(1e-30)
    for a, b, c in ((3.4445, -4.7750, 2.0315),) * 5 if name == "quintic" else POLAR:
        x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
    return x


def rows_of(x: Tensor) -> Rows:
    return Rows(torch.empty(x.shape))


@pytest.mark.parametrize("name", ITERATIONS)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_gram_space_equals_the_plain_iteration_for_any_spectrum(m: int, n: int, kind: str, name: str):
    x = with_spectrum(m, n, SPECTRA[kind](min(m, n)))
    found = orthogonalize(x.float(), rows_of(x), ITERATIONS[name])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), reference(x, name), rtol=0, atol=2e-3)
    assert found.isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_scale_of_the_matrix_does_not_matter(scale: float):
    x = with_spectrum(64, 32, SPECTRA["geometric"](32))
    torch.testing.assert_close(
        orthogonalize((scale * x).float(), rows_of(x), POLAR).double(), reference(x), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("name", ITERATIONS)
@pytest.mark.parametrize("method", [orthogonalize, _orthogonalize_bfloat16])
@pytest.mark.parametrize(("m", "n"), [(256, 64), (64, 64), (64, 160)])
def test_singular_values_come_near_to_one(method, m: int, n: int, name: str):
    sigma = torch.logspace(0, -3, min(m, n), dtype=F64)
    x = with_spectrum(m, n, sigma)
    above = int((sigma / sigma.norm() >= 0.003).sum())
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = method(x.float(), rows_of(x), ITERATIONS[name]).double()
    kept = torch.linalg.svdvals(found)
    assert kept[0] <= 1.25 and kept[above - 1] >= 0.65
    aligned = ((u.mT @ found) * vh).sum(1)  # ≈ the values at the old singular vectors: the sign is right
    assert aligned[:above].min() > 0.65


def test_the_input_is_not_changed():
    x = torch.randn(8, 5)
    before = x.clone()
    orthogonalize(x, rows_of(x), POLAR)
    _orthogonalize_bfloat16(x, rows_of(x), POLAR)
    assert torch.equal(x, before)


class Parts:
    """The rows of one of several processes; the sum over the others was made beforehand."""

    def __init__(self, shape: tuple[int, int], whole_gram: Tensor):
        self.shape, self.whole_gram = shape, whole_gram

    def sum(self, part: Tensor) -> Tensor:
        assert part.shape == self.whole_gram.shape
        return self.whole_gram


def test_row_shards_of_a_tall_matrix_need_only_the_sum_of_their_gram_matrices():
    x = torch.randn(50, 20)
    parts = [x[:17], x[17:50], x[50:]]  # the last has no rows
    gram = torch.stack([part.mT @ part for part in parts]).sum(0)
    found = [orthogonalize(part, cast(Rows, Parts((50, 20), gram)), POLAR) for part in parts]
    torch.testing.assert_close(torch.cat(found), orthogonalize(x, rows_of(x), POLAR))


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_spectral_norm_is_found_from_below_and_warm_starts(m: int, n: int):
    x = with_spectrum(m, n, torch.linspace(3, 1, min(m, n), dtype=F64)).float()
    vector = torch.randn(n, generator=torch.Generator().manual_seed(1))
    estimates = [float(spectral_norm(x, rows_of(x), vector, 2)) for _ in range(100)]
    largest = 3.0
    assert all(a <= b * (1 + 1e-5) for a, b in zip(estimates, estimates[1:], strict=False))
    assert estimates[0] <= largest * (1 + 1e-5)
    assert estimates[-1] == pytest.approx(largest, rel=1e-4)
    assert vector.norm() == pytest.approx(1, rel=1e-5)
    assert (x @ vector).norm() == pytest.approx(largest, rel=1e-3)


def test_spectral_norm_of_a_zero_matrix_is_zero_and_keeps_the_vector():
    x, vector = torch.zeros(4, 3), torch.tensor([0.6, 0.8, 0.0])
    assert spectral_norm(x, rows_of(x), vector, 2) == 0
    torch.testing.assert_close(vector, torch.tensor([0.6, 0.8, 0.0]))
