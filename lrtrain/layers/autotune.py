"""Which of several ways to compute the same thing is the fastest: measured once, then remembered on disk."""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lrtrain.core.cache import cache_folder, locked
from lrtrain.core.memo import read_memo, write_memo

ROUNDS, SECONDS = 5, 0.5  # measuring ends when both are reached: small things are repeated more often


def fastest(what: list[int | str], device: torch.device, candidates: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest candidate on this machine.

    Args:
        what: all that the times depend on besides the machine, its threads and torch.
        candidates: each computes the thing once.
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
    """In the folder of all that lrtrain computes once; deleting the file is safe."""
    return cache_folder() / "fastest.json"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def best_seconds(candidates: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """The shortest time of each candidate. They take turns, so that a busy machine slows them alike."""
    for run in candidates.values():  # warms up
        run()
    best = dict.fromkeys(candidates, math.inf)
    started, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - started < SECONDS:
        for name, run in candidates.items():
            best[name] = min(best[name], seconds(run, device))
        rounds += 1
    return best


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, all of its work on the device done."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
