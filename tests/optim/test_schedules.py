"""Schedules at their edges."""

import pytest

from lrtrain.optim.schedules import constant, cosine, cosine_restarts, loro, wsd


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


# What the published code gives at (steps of the run, of its warmup), by the step from 0.
LORO = {
    (10_000, 1_000, 500): {0: 0.1, 499: 0.534053, 500: 1e-6, 503: 0.320954, 999: 0.968976, 1000: 0.972862, 1500: 1e-6,
                           5000: 1e-6, 5002: 0.310001, 5005: 0.774319, 9999: 0.127192},
    (60_000, 2_000, 500): {499: 0.31802, 500: 1e-6, 503: 0.191074, 2000: 0.976444, 5002: 0.99408, 6503: 0.59911,
                           59_999: 0.123564},
    (100_000, 10_000, 200): {499: 0.143405, 2002: 0.109588, 6500: 0.6654, 9999: 0.969759, 99_999: 0.127144},
}  # fmt: skip


@pytest.mark.parametrize("run", LORO)
def test_loros_schedule_is_that_of_its_code(run: tuple[int, int, int]):
    steps, warmup, every = run
    found = {step: loro(step, steps, round(warmup / steps, 10), 0.1, every, 5, 0.1) for step in LORO[run]}
    assert found == pytest.approx(LORO[run], abs=1e-6)


def test_a_warmup_over_all_steps_is_a_schedule_too():
    assert all(0 <= loro(step, 10, 1.0, 0.1, 5, 2, 0.1) <= 1 for step in range(10))
