"""Pictures are drawn from a run's files, whatever of them a run has."""

from pathlib import Path

import numpy as np
import pytest
import torch
from crew import Command, metrics_of
from matplotlib.image import imread

from lrtrain.analysis.plots import load_run, plot_run, plot_runs
from lrtrain.measure.weights import spectra_metrics
from lrtrain.tracking.jsonl import JsonlTracker

SCRIPT = Path(__file__).parents[2] / "scripts" / "plot_run.py"


def train(run_dir: Path, steps: int = 6, rank: int = 12, evaluate: bool = True, spectra: bool = True) -> Path:
    """The files of a run whose first spectra are zero, as those of layers with B = 0."""
    tracker = JsonlTracker(run_dir, "id")
    for step in range(steps + 1):
        tracker.log(step, 1000 * step, metrics_of({"train/loss": 10 / (step + 1)}))
        if evaluate and step % 2 == 0:
            tracker.log(step, 1000 * step, metrics_of({"eval/loss": 11 / (step + 1)}))
        if spectra and step % 2 == 0:
            sigma = {
                f"model.layers.{depth}.{projection}": step * np.geomspace(3, 0.1, length)
                for depth in range(3)
                for projection, length in (("q_proj", rank), ("up_proj", rank + depth))
            } | {"lm_head": np.ones(4)}
            tracker.log(step, 1000 * step, spectra_metrics({k: torch.from_numpy(v) for k, v in sigma.items()}))
            tracker.log_spectra(step, sigma)
    tracker.finish({}, 0)
    return run_dir


def is_a_picture(path: Path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 300 and float(pixels.std()) > 0.02


@pytest.mark.parametrize("evaluate", [True, False])
@pytest.mark.parametrize("spectra", [True, False])
def test_a_run_has_a_picture(tmp_path: Path, evaluate: bool, spectra: bool):
    picture = plot_run(train(tmp_path, evaluate=evaluate, spectra=spectra))
    assert picture == tmp_path / "plots" / "summary.png"
    assert is_a_picture(picture)


def test_a_run_that_logged_nothing_has_a_picture(tmp_path: Path):
    JsonlTracker(tmp_path, "id").finish({}, 1)
    assert is_a_picture(plot_run(tmp_path))


def test_a_run_of_zero_matrices_has_a_picture(tmp_path: Path):
    assert is_a_picture(plot_run(train(tmp_path, steps=0)))


def test_a_run_whose_matrices_all_stay_zero_has_a_picture(tmp_path: Path):
    tracker = JsonlTracker(tmp_path, "id")
    for step in (0, 1):
        sigma = {f"model.layers.{depth}.{kind}_proj": torch.zeros(4) for depth in range(2) for kind in "qkvo"}
        tracker.log(step, 1000 * step, [*metrics_of({"train/loss": 1.0}), *spectra_metrics(sigma)])
        tracker.log_spectra(step, {name: values.numpy() for name, values in sigma.items()})
    tracker.finish({}, 0)
    assert is_a_picture(plot_run(tmp_path))


def test_runs_of_different_ranks_are_compared_in_one_picture(tmp_path: Path):
    runs = [train(tmp_path / "a"), train(tmp_path / "b", rank=30), train(tmp_path / "c", spectra=False)]
    assert is_a_picture(plot_runs(runs, tmp_path / "out" / "comparison.png"))


def test_spectra_that_a_resume_took_back_are_not_shown(tmp_path: Path):
    train(tmp_path, steps=6)
    JsonlTracker(tmp_path, "id").log(3, 3000, metrics_of({"train/loss": 1.0}))
    assert list(load_run(tmp_path).spectra) == [0, 2]


def test_the_script_prints_a_table_and_draws(tmp_path: Path):
    runs = [str(train(tmp_path / name)) for name in ("a", "b")]
    shown = Command(SCRIPT, runs, tmp_path).result()
    assert shown.returncode == 0, shown.stderr
    assert is_a_picture(tmp_path / "b" / "plots" / "summary.png")
    header, first, *_ = shown.stdout.splitlines()
    assert header.split()[0] == "run" and first.split()[:2] == ["a", "6"]


def test_the_script_says_which_directory_is_no_run(tmp_path: Path):
    shown = Command(SCRIPT, [str(tmp_path)], tmp_path).result()
    assert shown.returncode == 2 and str(tmp_path) in shown.stderr
