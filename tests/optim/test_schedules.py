"""Schedules at their edges."""

import pytest

from lrtrain.optim.schedules import constant, cosine, cosine_restarts, wsd


def test_all_warm_up_linearly_from_above_zero_to_one():
    for schedule in (
        lambda s: constant(s, 100, 0.1),
        lambda s: cosine(s, 100, 0.1, 0.1),
        lambda s: wsd(s, 100, 0.1, 0.2, 0.0),
    ):
        assert [schedule(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])


def test_no_warmup_starts_at_one():
    assert constant(0, 100, 0.0) == cosine(0, 100, 0.0, 0.1) == wsd(0, 100, 0.0, 0.2, 0.0) == 1.0


def test_cosine_ends_at_its_floor_and_is_halfway_in_the_middle():
    assert cosine(99, 100, 0.1, 0.1) == pytest.approx(0.1)
    assert cosine(10, 101, 10 / 101, 0.0) == 1.0
    assert cosine(55, 101, 10 / 101, 0.2) == pytest.approx(0.6)


def test_restarts_ramp_back_onto_the_one_cosine():
    found = [cosine_restarts(s, 100, 0.1, 0.1, 25, 4) for s in range(100)]
    base = [cosine(s, 100, 0.1, 0.1) for s in range(100)]
    for start in (25, 50, 75):
        assert found[start : start + 4] == pytest.approx([base[start + 3] * k / 4 for k in (1, 2, 3, 4)])
    ramps = {start + k for start in (25, 50, 75) for k in range(3)}
    assert [found[s] for s in range(100) if s not in ramps] == [base[s] for s in range(100) if s not in ramps]


def test_wsd_is_stable_and_then_falls_linearly():
    assert [wsd(s, 100, 0.1, 0.2, 0.0) for s in range(10, 79)] == [1.0] * 69
    assert wsd(99, 100, 0.1, 0.2, 0.0) == 0.0
    assert wsd(89, 100, 0.1, 0.2, 0.0) == pytest.approx(0.5)
    assert wsd(99, 100, 0.1, 0.2, 0.1) == pytest.approx(0.1)
