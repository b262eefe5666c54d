"""The peak that MFU is a share of, and what is added up between two readings."""

import time

import pytest
import torch

from lrtrain.core.metrics import spelled
from lrtrain.model.flops import Flops
from lrtrain.run import throughput
from lrtrain.run.throughput import Meter, matmul_peak


def test_a_core_that_is_busy_elsewhere_at_first_does_not_lower_the_peak(monkeypatch: pytest.MonkeyPatch):
    free_from = time.perf_counter() + 0.05
    monkeypatch.setattr(throughput, "_product_seconds", lambda a: 0.01 if time.perf_counter() > free_from else 0.015)
    assert matmul_peak.__wrapped__(torch.device("cpu"), torch.float32) == 2 * 256**3 / 0.01


def test_a_reading_is_of_the_steps_since_the_last_one():
    meter, flops = Meter(peak=2000.0), Flops(model=2.0, dense_equivalent=5.0)
    meter.add(seconds=1.0, waited=0.0, tokens=10)
    meter.read(flops)
    meter.add(seconds=2.0, waited=0.0, tokens=300)
    meter.add(seconds=1.0, waited=0.75, tokens=300)
    assert spelled(meter.read(flops)) == {
        "perf/tokens_per_second": 200.0,
        "perf/step_seconds": 1.5,
        "perf/data_wait_pct": 25.0,
        "perf/mfu": 0.2,
        "perf/mfu_dense_equivalent": 0.5,
    }
