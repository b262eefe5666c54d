"""Measures of hidden states against worked examples."""

import math

import pytest
import torch

from lrtrain.measure.representations import (
    SecondMoment,
    exact_nuclear_norm,
    matrix_entropy,
    matrix_nuclear_norm,
    normalized_rows,
    rankme,
)

Z = torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, 1], [2, 0, 3, 1]])
R = torch.tensor([[1.0, 2], [3, 1], [2, 6]])


def moment(rows: torch.Tensor) -> SecondMoment:
    found = SecondMoment(rows.shape[1])
    found.add(rows)
    return found


def test_rankme_of_a_worked_example():
    states = moment(Z)
    assert states.singular_values(False)[:3].tolist() == pytest.approx([3.964954, 2.088063, 0.958713], abs=1e-6)
    assert rankme(states.singular_values(False)[:3]) == pytest.approx(2.599095, abs=1e-6)
    assert rankme(states.singular_values(True)) == pytest.approx(1.833144, abs=1e-6)


@pytest.mark.parametrize("width, expected", [(4, 3.3635864), (128, 3.364259), (1024, 3.369121), (4096, 3.385844)])
def test_the_published_constant_counts_zeros(width: int, expected: float):
    sigma = torch.zeros(width)
    sigma[:4] = torch.tensor([4.0, 2, 1, 1])
    assert rankme(sigma, eps=1e-7) == pytest.approx(expected, abs=1e-6)
    assert rankme(sigma) == pytest.approx(3.363586, abs=1e-6)


def test_the_matrix_nuclear_norm_of_worked_examples():
    assert matrix_nuclear_norm(R) == pytest.approx(0.784412, abs=1e-6)
    assert exact_nuclear_norm(R) * 3 == pytest.approx(2.351557, abs=1e-6)
    assert matrix_nuclear_norm(Z) == pytest.approx(0.899033, abs=1e-6)
    assert exact_nuclear_norm(Z) * 3 == pytest.approx(2.359631, abs=1e-6)


def test_the_matrix_nuclear_norm_depends_on_the_axes_and_the_exact_one_does_not():
    signs = torch.tensor([1.0, -1.0] * 4)[:, None]
    along, across = signs * torch.tensor([1.0, 0, 0, 0]), signs * torch.full((4,), 0.5)
    assert 8 * matrix_nuclear_norm(along) == pytest.approx(2.828427, abs=1e-6)
    assert 8 * matrix_nuclear_norm(across) == pytest.approx(5.656854, abs=1e-6)
    assert 8 * exact_nuclear_norm(along) == pytest.approx(8 * exact_nuclear_norm(across)) == pytest.approx(8**0.5)


def test_the_matrix_entropy_of_a_worked_example():
    assert matrix_entropy(Z) * math.log(4) == pytest.approx(0.552772, abs=1e-6)
    assert matrix_entropy(Z) == pytest.approx(0.398741, abs=1e-6)


def test_one_token_has_no_measure_and_equal_tokens_have_finite_ones():
    assert math.isnan(matrix_nuclear_norm(Z[:1])) and math.isnan(matrix_entropy(Z[:1]))
    assert matrix_nuclear_norm(torch.ones(3, 4)) == 0
    assert normalized_rows(torch.ones(3, 4)).isfinite().all()


def test_streaming_rows_have_the_spectrum_of_all_of_them():
    rows = torch.randn(300, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    found = SecondMoment(20)
    for part in rows.split(70):
        found.add(part)
    torch.testing.assert_close(found.singular_values(False), torch.linalg.svdvals(rows), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        found.singular_values(True), torch.linalg.svdvals(rows - rows.mean(0)), rtol=1e-10, atol=0
    )


def test_a_shift_of_all_states_hides_their_rank():
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    shifted = moment(rows + 3)
    assert rankme(shifted.singular_values(False)) < 0.8 * rankme(shifted.singular_values(True))
    assert rankme(shifted.singular_values(True)) == pytest.approx(rankme(moment(rows).singular_values(True)))
