"""`<run.dir>/metrics.jsonl`: all metrics of a run, one strict JSON object per line.

A row: schema (1), run_id, segment (0, then one more for each time the run was resumed), step (optimizer updates
completed), tokens (seen by all processes), time (Unix seconds), wall_s (seconds since the segment began),
metrics (name → number, null if not finite) and nonfinite (the names of these).
"""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from lrtrain.core.files import sync_folder
from lrtrain.core.metrics import Metric, spelled
from lrtrain.tracking.base import Tracker, Value
from lrtrain.tracking.spectra_files import save_spectra

SCHEMA = 1


class Row(TypedDict):
    schema: int
    run_id: str
    segment: int
    step: int
    tokens: int
    time: float
    wall_s: float
    metrics: dict[str, float | None]
    nonfinite: list[str]


class JsonlTracker(Tracker):
    """Appends to metrics.jsonl and writes spectra/*.npz."""

    def __init__(self, run_dir: Path, run_id: str):
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        path.touch()
        _cut_torn_tail(path)
        self._segment = 1 + max((row["segment"] for row in _rows(path)), default=-1)
        self._run_dir = run_dir
        self._run_id = run_id
        self._began = time.time()
        self._file = path.open("ab", buffering=0)  # unbuffered, so that a killed process loses no row
        sync_folder(run_dir)
        self._waiting = b""
        self._failed: set[str] = set()

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        now = time.time()
        values = {name: _finite_or_none(float(value)) for name, value in spelled(metrics).items()}
        row = Row(
            schema=SCHEMA,
            run_id=self._run_id,
            segment=self._segment,
            step=step,
            tokens=tokens,
            time=now,
            wall_s=round(now - self._began, 3),
            metrics=values,
            nonfinite=_names_of_none(values),
        )
        self._waiting += json.dumps(row, allow_nan=False).encode() + b"\n"
        self._write()

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray]) -> None:
        try:
            save_spectra(self._run_dir, step, spectra)
        except OSError as error:
            self._tell("spectra/", f"{error}; this and what else finds no room is left out")

    def sync(self) -> None:
        self._write()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._tell("metrics.jsonl", f"{error}")

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        self.sync()
        self._file.close()
        if self._waiting:
            lost = self._waiting.count(b"\n")
            print(f"tracking: metrics.jsonl has not got its last {lost} rows", file=sys.stderr, flush=True)

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]  # a full disk may accept a part
        except OSError as error:
            self._tell("metrics.jsonl", f"{error}; its rows wait in memory until there is room")

    def _tell(self, what: str, reason: str) -> None:
        """Print an error once per file, since a full disk should not fill the console."""
        if what not in self._failed:
            print(f"tracking: {what} cannot be written: {reason}", file=sys.stderr, flush=True)
        self._failed.add(what)


def read_metrics(path: Path) -> list[Row]:
    """One row per step, ascending, with all metrics logged at that step.

    For a resumed run the newest segment wins: for a name logged twice at a step, and for steps of an older segment
    beyond the checkpoint from which the newer one started. A partial last line is ignored; other damaged lines are
    ignored and reported.
    """
    rows = list(_rows(path))
    resumed_at = {row["segment"]: row["step"] for row in reversed(rows)}  # its first step
    merged: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: (row["step"], row["segment"])):
        if any(row["segment"] < newer and row["step"] > first for newer, first in resumed_at.items()):
            continue
        known = merged.get(row["step"])
        metrics = (known["metrics"] if known else {}) | row["metrics"]
        merged[row["step"]] = {**row, "metrics": metrics, "nonfinite": _names_of_none(metrics)}
    return list(merged.values())


def series(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one metric; NaN where the value was not finite."""
    rows = [row for row in read_metrics(path) if key in row["metrics"]]
    values = [math.nan if (value := row["metrics"][key]) is None else value for row in rows]
    return np.array([row["step"] for row in rows], dtype=int), np.array(values, dtype=float)


def _rows(path: Path) -> Iterator[Row]:
    *lines, _torn = path.read_bytes().split(b"\n")  # text after the last newline is incomplete
    rows = [_row(line) for line in lines]
    damaged = [number for number, row in enumerate(rows, start=1) if row is None]
    if damaged:
        others = f" and {len(damaged) - 1} more are" if len(damaged) > 1 else " is"
        _tell_once(f"{path}: line {damaged[0]}{others} damaged and left out")
    return (row for row in rows if row is not None)


def _row(line: bytes) -> Row | None:
    """The row of a line; None if the line is damaged, e.g. by a system crash."""
    try:
        row: Any = json.loads(line)
        numbers = [row[key] for key in ("segment", "step", "tokens", "time", "wall_s")]
        values = [value for value in row["metrics"].values() if value is not None]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return row if all(isinstance(value, int | float) for value in numbers + values) else None


@functools.cache
def _tell_once(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _cut_torn_tail(path: Path) -> None:
    """Remove a partial last line, left by a kill during a write."""
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _names_of_none(metrics: Mapping[str, float | None]) -> list[str]:
    return [name for name, value in metrics.items() if value is None]
