"""A direction from one look at each row, against that of all rows."""

import pytest
import torch

from lrtrain.measure.streaming import LeadingDirection

SCALES = torch.cat([torch.tensor([3.0, 2.0]), torch.ones(254)])


def test_one_look_at_each_row_finds_the_leading_direction():
    rows = torch.randn(20_000, 256, generator=torch.Generator().manual_seed(0)) * SCALES
    found = LeadingDirection(256, torch.device("cpu"))
    for block in rows.split(1000):
        found.add(block)
    _, sigma, vt = torch.linalg.svd(rows.double(), full_matrices=False)
    assert abs(float(found.basis[:, 0].double() @ vt[0])) > 0.97
    assert found.metrics()["top_share"] == pytest.approx(float(sigma[0] ** 2 / sigma.square().sum()), rel=0.1)
    assert found.metrics()["mean_share"] == pytest.approx(1 / 20_000, rel=0.5)


def test_rows_of_rank_one_are_told_exactly():
    found = LeadingDirection(8, torch.device("cpu"))
    for size in (3, 0, 5):
        found.add(torch.ones(size, 8))
    assert found.metrics() == {"top_share": pytest.approx(1, rel=1e-5), "mean_share": pytest.approx(1, rel=1e-5)}


def test_zero_rows_have_no_direction():
    found = LeadingDirection(8, torch.device("cpu"))
    found.add(torch.zeros(4, 8))
    assert found.metrics() == {}
