"""Principal angles of planes whose angles are known."""

import math

import pytest
import torch

from lrtrain.linalg.subspaces import overlap, principal_angles, relative_gap


def tilted(angle: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Bases of span(e1, e2) and of span(cos·e1 + sin·e3, e2)."""
    eye = torch.eye(5, dtype=torch.float64)
    return eye[:, :2], torch.stack([math.cos(angle) * eye[0] + math.sin(angle) * eye[2], eye[1]], dim=1)


@pytest.mark.parametrize("angle", [1e-10, 1e-4, 0.3, 1.2, math.pi / 2])
def test_the_angle_of_a_tilted_plane(angle: float):
    assert principal_angles(*tilted(angle)).tolist() == pytest.approx([0, angle], rel=1e-6, abs=1e-15)


def test_the_overlap_of_a_tilted_plane():
    assert overlap(*tilted(0.3)) == pytest.approx(0.956334, abs=1e-6)
    assert math.sin(principal_angles(*tilted(0.3))[-1]) == pytest.approx(0.295520, abs=1e-6)


def test_another_basis_of_the_same_space_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(40, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    mixed = second @ torch.randn(6, 6, dtype=torch.float64, generator=generator)
    u, v, w = (torch.linalg.qr(columns).Q for columns in (first, second, mixed))
    assert overlap(u, v) == pytest.approx(overlap(u, w), abs=1e-12)
    assert torch.allclose(principal_angles(u, v), principal_angles(u, w), atol=1e-10)
    assert overlap(v, w) == pytest.approx(1, abs=1e-12)


def test_random_spaces_overlap_by_k_over_d():
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(100, 10, generator=generator)).Q for _ in range(60)]
    found = [overlap(u, v) for u, v in zip(bases[::2], bases[1::2], strict=True)]
    assert sum(found) / len(found) == pytest.approx(0.1, rel=0.1)


def test_the_gap_after_the_kth_value():
    sigma = torch.tensor([4.0, 2.0, 1.9])
    assert relative_gap(sigma, 1) == pytest.approx(0.5)
    assert relative_gap(sigma, 2) == pytest.approx(0.05)
    assert relative_gap(sigma, 3) == 1
