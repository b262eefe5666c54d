"""Updates of weights against dense differences and SVDs."""

import copy
import math

import pytest
import torch
from torch import nn

from lrtrain.core.metrics import spelled
from lrtrain.measure.metrics import effective_rank
from lrtrain.measure.movement import Movement, compare


def double(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_an_update_is_told_by_its_own_spectrum():
    before = double([1, 1, 0], [2, 3, 1], [0, 2, 2])
    update = double([0.1, 0.1, 0.11], [0, 0, 0.2], [0, -0.1, -0.1])
    found = compare(before, before + update, 1, "start")
    sigma = torch.tensor([0.271784, 0.120410, 0.061114], dtype=torch.float64)
    assert found["spectral_norm_since_start"] == pytest.approx(0.271784, abs=1e-6)
    assert found["erank_since_start"] == pytest.approx(effective_rank(sigma), abs=1e-4)
    assert found["relative_since_start"] == pytest.approx(float(sigma.norm()) / math.sqrt(24), abs=1e-6)


def test_a_rotation_turns_the_leading_space_by_its_angle():
    c, s = math.cos(0.3), math.sin(0.3)
    before, now = torch.diag(torch.tensor([2.0, 1, 0.1]).double()), double([2 * c, 0, 0], [0, 1, 0], [2 * s, 0, 0.1])
    found = compare(before, now, 2, "last")
    assert found["angle_with_last"] == pytest.approx(0.3, abs=0.02)
    assert found["overlap_with_last"] == pytest.approx((1 + c * c) / 2, abs=0.01)
    assert compare(before, before, 2, "last") == {}
    from_zero = compare(torch.zeros(3, 3).double(), now, 2, "start")
    assert from_zero.keys() == {"erank_since_start", "spectral_norm_since_start"}


def test_the_start_and_the_last_measurement_are_told_apart():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    start = copy.deepcopy(layer)
    movement = Movement(lambda name: start)
    assert movement.measure({"a": layer}) == []
    for step in (1, 2):
        with torch.no_grad():
            layer.weight[0, 0] += 0.5
        found = spelled(movement.measure({"a": layer}))
        assert found["updates/a/spectral_norm_since_start"] == pytest.approx(0.5 * step, rel=1e-6)
        assert found["updates/a/spectral_norm_since_last"] == pytest.approx(0.5, rel=1e-6)
        assert found["updates/summary/all/erank_since_last_mean"] == pytest.approx(1, abs=1e-5)
