"""metrics.jsonl: strict, whole after a kill, and one story of a run that was resumed."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from crew import metrics_of

from lrtrain.tracking.fanout import FanOut
from lrtrain.tracking.jsonl import JsonlTracker, read_metrics, series
from lrtrain.tracking.spectra_files import load_spectra, spectra_steps


def lines(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines()


def reject(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def test_a_row_says_what_and_when(tmp_path: Path):
    JsonlTracker(tmp_path, "run-a").log(step=3, tokens=300, metrics=metrics_of({"train/loss": 2.5}))
    row = json.loads(lines(tmp_path)[0])
    assert row.pop("time") > 1.7e9 and row.pop("wall_s") >= 0
    assert row == {
        "schema": 1,
        "run_id": "run-a",
        "segment": 0,
        "step": 3,
        "tokens": 300,
        "metrics": {"train/loss": 2.5},
        "nonfinite": [],
    }


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path: Path):
    metrics = {"train/nan": math.nan, "train/inf": -math.inf, "train/fine": np.float32(0.5)}
    JsonlTracker(tmp_path, "a").log(1, 1, metrics_of(metrics))
    row = json.loads(lines(tmp_path)[0], parse_constant=reject)
    assert row["metrics"] == {"train/nan": None, "train/inf": None, "train/fine": 0.5}
    assert row["nonfinite"] == ["train/nan", "train/inf"]
    steps, values = series(tmp_path / "metrics.jsonl", "train/nan")
    assert steps.tolist() == [1] and math.isnan(values[0])


def test_each_row_is_on_disk_before_the_next(tmp_path: Path):
    tracker = JsonlTracker(tmp_path, "a")
    for step in (1, 2, 3):
        tracker.log(step, step, metrics_of({"train/x": step}))
        assert len(lines(tmp_path)) == step


def test_what_is_logged_at_one_step_is_read_as_one_row(tmp_path: Path):
    tracker = JsonlTracker(tmp_path, "a")
    tracker.log(1, 10, metrics_of({"train/loss": 3.0}))
    tracker.log(1, 10, metrics_of({"eval/loss": 4.0}))
    assert [row["metrics"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        {"train/loss": 3.0, "eval/loss": 4.0}
    ]


@pytest.mark.parametrize("torn", ['{"schema": 1, "st', '{"schema": 1}', "\N{GREEK SMALL LETTER SIGMA}"])
def test_a_torn_tail_is_ignored_and_does_not_spoil_the_next_row(tmp_path: Path, torn: str):
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(tmp_path, "a").log(1, 1, metrics_of({"train/x": 1.0}))
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    JsonlTracker(tmp_path, "a").log(2, 2, metrics_of({"train/x": 2.0}))
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_tail_torn_inside_a_character_is_ignored(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(tmp_path, "a").log(1, 1, metrics_of({"train/x": 1.0}))
    with path.open("ab") as file:
        file.write("σ".encode()[:1])
    assert len(read_metrics(path)) == 1


def test_the_newest_segment_counts(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(tmp_path, "a")
    for step in (1, 2, 3, 4, 5):
        first.log(step, step, metrics_of({"train/loss": 10.0 + step, "train/only_first": 0.0}))
    second = JsonlTracker(tmp_path, "a")  # resumed from the checkpoint of step 2
    for step in (3, 4):
        second.log(step, step, metrics_of({"train/loss": 20.0 + step}))

    steps, values = series(path, "train/loss")
    assert steps.tolist() == [1, 2, 3, 4]  # step 5 was taken back
    assert values.tolist() == [11.0, 12.0, 23.0, 24.0]
    assert [row["segment"] for row in read_metrics(path)] == [0, 0, 1, 1]
    assert len(lines(tmp_path)) == 7  # and nothing is lost from the file


def test_series_of_an_unknown_name_is_empty(tmp_path: Path):
    JsonlTracker(tmp_path, "a").log(1, 1, metrics_of({"train/x": 1.0}))
    steps, values = series(tmp_path / "metrics.jsonl", "y")
    assert len(steps) == len(values) == 0


def test_spectra_come_back_in_float32(tmp_path: Path):
    tracker = JsonlTracker(tmp_path, "a")
    spectra = {"layers.0.q_proj": np.array([3.0, 2.0]), "layers.0.up_proj": np.array([1.0])}
    tracker.log_spectra(100, spectra)
    tracker.log_spectra(20, spectra)
    assert spectra_steps(tmp_path) == [20, 100]
    loaded = load_spectra(tmp_path, 100)
    assert list(loaded) == list(spectra)
    assert loaded["layers.0.q_proj"].dtype == np.float32
    assert loaded["layers.0.q_proj"].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    "garbage", [b"}{", b"5", b'{"step": 2}', b"\0" * 50, b"[" * 200_000, b'{"metrics": 1, "step": "a"}']
)
def test_a_damaged_line_is_named_and_the_others_are_read(tmp_path: Path, capsys, garbage: bytes):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(tmp_path, "a")
    for step in (1, 2, 3):
        tracker.log(step, step, metrics_of({"train/x": step}))
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0] + garbage + b"\n" + rows[2])
    assert series(path, "train/x")[0].tolist() == series(path, "train/x")[0].tolist() == [1, 3]
    assert capsys.readouterr().err == f"{path}: line 2 is damaged and left out\n"
    JsonlTracker(tmp_path, "a").log(4, 4, metrics_of({"train/x": 4}))  # resumed
    assert series(path, "train/x")[0].tolist() == [1, 3, 4]


def test_what_was_logged_before_a_checkpoint_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    tracker = FanOut({"jsonl": JsonlTracker(tmp_path, "a")})
    tracker.log(1, 1, metrics_of({"train/x": 1.0}))
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    tracker.sync()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_size] and synced[0] > 0
