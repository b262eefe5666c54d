"""Choosing the fastest of several implementations: timed once, then cached on disk."""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lrtrain.core.cache import cache_folder, locked
from lrtrain.core.memo import read_memo, write_memo

ROUNDS, SECONDS = 5, 0.5  # timing ends when both are reached: fast candidates are repeated more often


def fastest(what: list[int | str], device: torch.device, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate on this machine.

    Args:
        what: the cache key: everything the times depend on besides the machine, its threads and torch's version.
        candidates: functions that compute the same result.
    """
    key = json.dumps([*what, device_name(device), torch.get_num_threads(), torch.__version__], ensure_ascii=False)
    path = memory_path()
    with locked(path):
        known = read_memo(path)
        if known.get(key) not in candidates:
            times = best_seconds(candidates, device)
            known[key] = min(times, key=lambda name: times[name])
            write_memo(path, known)
    return known[key]


def memory_path() -> Path:
    """The cache file of timings; deleting it is safe."""
    return cache_folder() / "fastest.json"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def best_seconds(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The shortest time of each candidate. Candidates alternate, so that a busy machine slows all of them."""
    for run in candidates.values():  # warm-up
        run()
    best = dict.fromkeys(candidates, math.inf)
    started, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - started < SECONDS:
        for name, run in candidates.items():
            best[name] = min(best[name], seconds(run, device))
        rounds += 1
    return best


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, including its work on the device."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
