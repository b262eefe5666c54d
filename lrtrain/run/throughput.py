"""Tokens per second, memory, model FLOPs utilization, and the peak that it is a share of."""

import resource
import sys
import time
from functools import cache

import torch

from lrtrain.core.metrics import Metric, scalars
from lrtrain.model.flops import Flops

BUSY = 0.1
"""Seconds that a stall is taken to last at most: of fifteen peaks taken within 20 ms two were a third too low."""


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def allocator_metrics(device: torch.device) -> dict[str, float]:
    """Of a GPU's allocator: the peak of reserved memory (GiB), and how often it gave up its cache to try again, each of
    which waits for the GPU; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    retries = torch.cuda.memory_stats(device).get("num_alloc_retries", 0)
    return {"memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30, "allocation_retries": retries}


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this process's best square matrix product: measured, so that no table of devices can be wrong.

    MFU is a share of this figure; a share of the data sheet's peak is lower. Sizes grow until one takes 5 ms, which
    larger ones did not surpass (within 2 %, on 1 and 2 cores); that one is repeated for as long as a core may be busy
    elsewhere. It is measured at every start.
    """
    best = 0.0
    for size in (256, 512, 1024, 2048, 4096, 8192):
        a = torch.randn(size, size, device=device, dtype=dtype)
        seconds = min(_product_seconds(a) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.005:
            break
    until = time.perf_counter() + BUSY
    while time.perf_counter() < until:
        best = max(best, 2 * size**3 / _product_seconds(a))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # these matrices do not belong to the run
    return best


def _product_seconds(a: torch.Tensor) -> float:
    started = time.perf_counter()
    (a @ a)[0, 0].item()  # .item() waits for the device
    return time.perf_counter() - started


class Meter:
    """Accumulates throughput over the steps since the last reading.

    Args:
        peak: FLOP/s of all processes together that MFU is a share of.
    """

    def __init__(self, peak: float):
        self.peak = peak
        self._clear()

    def _clear(self) -> None:
        self.seconds = self.waited = 0.0
        self.steps = self.tokens = 0

    def add(self, seconds: float, waited: float, tokens: int) -> None:
        """Add one step: its time, the part of it spent waiting for data, and its tokens over all processes."""
        self.seconds += seconds
        self.waited += waited
        self.steps += 1
        self.tokens += tokens

    def read(self, flops: Flops) -> list[Metric]:
        """The metrics since the last reading; MFU by the layers' own `flops` and by the dense model's."""
        rate = self.tokens / self.seconds
        metrics = {
            "tokens_per_second": rate,
            "step_seconds": self.seconds / self.steps,
            "data_wait_pct": 100 * self.waited / self.seconds,
            "mfu": rate * flops.model / self.peak,
            "mfu_dense_equivalent": rate * flops.dense_equivalent / self.peak,
        }
        self._clear()
        return scalars("perf", metrics)
