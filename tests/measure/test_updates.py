"""Spectra of updates from factors against the dense differences."""

import pytest
import torch

from lrtrain.measure.updates import first_order_update, update_singular_values

B = torch.tensor([[1.0, 0], [2, 1], [0, 2]])
A = torch.tensor([[1.0, 1, 0], [0, 1, 1]])


def test_a_worked_example():
    left = B + torch.tensor([[0.1, 0], [0, 0], [0, -0.1]])
    right = A + torch.tensor([[0, 0, 0.1], [0, 0, 0]])
    sigma = update_singular_values(B, A, left, right, 1.0)
    assert sigma.tolist() == pytest.approx([0.271784, 0.120410, 0.061114], abs=1e-6)


def test_a_worked_example_of_gradients():
    gradient = torch.diag(torch.tensor([1.0, 2, 1]))
    sigma = first_order_update(B, A, gradient @ A.T, B.T @ gradient)
    assert sigma.tolist() == pytest.approx([17.059042, 3.998636, 0], abs=1e-6)


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(60, 40, 8), (40, 60, 8), (30, 30, 30), (20, 50, 1)])
def test_updates_equal_the_dense_difference_however_small(shape: tuple[int, int, int], size: float):
    m, n, r = shape
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((m, r), (r, n)))
    new_left = left + size * torch.randn(m, r, dtype=torch.float64, generator=generator)
    new_right = right + size * torch.randn(r, n, dtype=torch.float64, generator=generator)
    dense = torch.linalg.svdvals(2 * ((new_left - left) @ new_right + left @ (new_right - right)))
    found = update_singular_values(left, right, new_left, new_right, 2.0)
    assert len(found) == min(2 * r, m, n)
    assert torch.allclose(found, dense[: len(found)], rtol=1e-8, atol=1e-9 * float(dense[0]))


def test_no_update_has_a_spectrum_of_zeros():
    assert update_singular_values(B, A, B, A, 1.0).abs().max() < 1e-12
