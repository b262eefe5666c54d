"""Pictures of spectra and their report, from the files of runs made up here."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from crew import Command, metrics_of
from launching import ROOT
from matplotlib.figure import Figure

from lrtrain.analysis.spectra_plots import Measured, draw_depths, draw_parts, draw_spectra, report, spectral_pictures
from lrtrain.tracking.jsonl import JsonlTracker

PARTS = ("low_rank", "sparse", "low_rank_null", "sparse_null")


def made_up(run_dir: Path, depth: int, rank: int, projections: list[str], steps: list[int], more: dict) -> Path:
    """A run whose effective rank is 10·depth + step, without any where it starts at zero."""
    tracker = JsonlTracker(run_dir, "id")
    for step in steps:
        layers = [f"model.layers.{i}.self_attn.{p}" for i in range(depth) for p in projections]
        eranks = {f"spectra/{layer}/erank": 10.0 * int(layer.split(".")[2]) + step for layer in layers}
        tracker.log(step, step, metrics_of({"train/loss": 3.0, **(eranks if step else {}), **more}))
        spectra = {layer: np.geomspace(1, 0.1, rank) * step for layer in layers}
        parts = {f"{layer}/{part}": 0.5 * sigma for layer, sigma in spectra.items() for part in PARTS if more}
        tracker.log_spectra(step, spectra | parts)
    tracker.finish({}, 0)
    return run_dir


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    shares = {f"spectra/summary/q_proj/{s}_share{n}_mean": 0.4 for s in ("head", "tail") for n in ("", "_null")}
    hidden = {
        f"hidden/{metric}/L0{i}": 1.0 for metric in ("rankme", "rankme_centered", "mnn", "matent") for i in (0, 1)
    }
    return [
        made_up(tmp_path / "a", 2, 8, ["q_proj", "up_proj"], [0, 5, 10], shares | hidden),
        made_up(tmp_path / "<b>", 3, 5, ["q_proj", "fc1"], [0, 20], {}),
    ]


@pytest.mark.full
def test_each_picture_is_drawn_where_a_run_has_what_it_needs(runs: list[Path]):
    named = [picture.name for picture in spectral_pictures(runs)]
    assert named == ["spectra", "effective-rank", "rank-over-depth", "head-and-tail", "contributions", "hidden-states"]
    assert [picture.name for picture in spectral_pictures(runs[1:])] == named[:3]


def test_lines_are_the_medians_over_layers_and_the_ranks_over_depth(runs: list[Path]):
    axes = Figure().subplots(1, 2)
    draw_spectra(axes[0], Measured(runs[0]), "q_proj")
    assert [line.get_label() for line in axes[0].lines] == ["step 5", "step 10"]  # step 0 is all zero
    np.testing.assert_allclose(axes[0].lines[1].get_ydata(), 10 * np.geomspace(1, 0.1, 8), rtol=1e-6)
    draw_depths(axes[1], Measured(runs[0]), "")
    first, last = axes[1].lines[:2]
    assert [*first.get_ydata()] == [5, 15] and [*last.get_ydata()] == [10, 20]


def test_bars_stack_to_the_singular_values(runs: list[Path]):
    axes = Figure().subplots()
    draw_parts(axes, Measured(runs[0]), "q_proj")
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[1]]  # of S, on those of L
    np.testing.assert_allclose(tops, np.geomspace(1, 0.1, 8), rtol=1e-6)


def test_the_report_needs_no_other_file(runs: list[Path]):
    pictures = spectral_pictures(runs)
    page = report(runs, pictures)
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', page)) == len(pictures) == page.count("<img")
    assert "http" not in page and "<script" not in page
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert "effective rank, up_proj" in page


@pytest.mark.full
def test_the_script_writes_all_and_tells_of_a_run_without_spectra(runs: list[Path], tmp_path: Path):
    def plot(*arguments: str | Path) -> subprocess.CompletedProcess:
        return Command(ROOT / "scripts" / "plot_spectra.py", [*map(str, arguments)], tmp_path).result()

    done = plot(*runs)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "spectra").iterdir()} == {Path(p).name for p in done.stdout.splitlines()}
    (tmp_path / "empty").mkdir()
    failed = plot(tmp_path / "empty")
    assert failed.returncode == 2 and "empty has no spectra" in failed.stderr
