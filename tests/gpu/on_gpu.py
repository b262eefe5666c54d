"""Runs on a GPU as a user starts them, and what they say of themselves."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launching import ROOT, command

from lrtrain.tracking.jsonl import series

QUIET = [
    "tracking=none",
    "train.log_every=1",
    "eval.every=0",
    "eval.sequences=8",
    "checkpoint.every=0",
    "spectra.every=0",
]


@dataclass
class Ran:
    """A finished run."""

    folder: Path
    summary: dict[str, Any]

    def values(self, name: str) -> list[float]:
        """A metric's values, by step."""
        found = series(self.folder / "metrics.jsonl", name)[1].tolist()
        assert found, f"{self.folder} has no {name}"
        return found

    def step_seconds(self) -> float:
        """The fastest step after the first two, which warm up."""
        return min(self.values("perf/step_seconds")[2:])

    def reserved_share(self) -> float:
        """The peak of reserved memory ÷ that of allocated memory."""
        return max(self.values("perf/memory_reserved_gib")) / self.summary["memory_gib"]


def environment(cpu: bool = False) -> dict[str, str]:
    """The environment of a run, on the CPU if asked for."""
    own = {"LRTRAIN_CONF": str(Path(__file__).parent)}  # where callbacks of the checks are
    return os.environ | own | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})


def run(folder: Path, *overrides: str, cpu: bool = False) -> Ran:
    """Train by the user's command, on one process."""
    line = command([*QUIET, f"run.dir={folder}", *overrides], 1)
    done = subprocess.run(line, cwd=ROOT, env=environment(cpu), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read(folder)


def read(folder: Path) -> Ran:
    """A run's results."""
    return Ran(folder, json.loads((folder / "summary.json").read_text()))


def script(name: str, *arguments: str, cpu: bool = False) -> str:
    """What a script prints."""
    line = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    done = subprocess.run(line, cwd=ROOT, env=environment(cpu), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def largest_gap(ours: Iterable[float], theirs: Iterable[float]) -> float:
    """The largest difference of two series."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


SIMULATE = """
import json, sys
from lrtrain.config.compose import compose
from lrtrain.simulation.roofline import whole
from lrtrain.simulation.step import simulate
step = simulate(compose("gpu=h100", *sys.argv[1:]), 1, 0)
print(json.dumps([step.peak / 2**30, whole(step).seconds]))
"""


def simulated(*overrides: str) -> tuple[float, float]:
    """Peak memory (GiB) and roofline seconds of a step on one simulated H100."""
    line = [sys.executable, "-c", SIMULATE, *QUIET, *overrides]
    done = subprocess.run(line, cwd=ROOT, env=environment(cpu=True), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds
