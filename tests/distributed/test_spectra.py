"""Looking at a model never changes what it becomes."""

from pathlib import Path

import pytest
from launching import TINY
from runs import losses, run_jobs

from lrtrain.tracking.jsonl import read_metrics, series

METHODS = {
    "dense": ["param=dense"],
    "sltrain": ["param=sltrain", "param.execution=factored"],
    "lost": ["param=lost"],
    "sst": ["param=sst", "param.iteration=2", "param.round=2", "param.warmup=2"],  # with random choices of its own
}
MEASURED = {"off": ["spectra=off"], "full": ["spectra=full", "spectra.every=1"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    jobs = [
        [*TINY, f"data.path={corpus}", *method, *measured, "train.steps=4", f"run.dir={folder}/{name}-{how}"]
        for name, method in METHODS.items()
        for how, measured in MEASURED.items()
    ]
    run_jobs(jobs, 2, folder)
    alone = [*TINY, f"data.path={corpus}", *METHODS["sltrain"], *MEASURED["full"], "train.steps=1"]
    run_jobs([[*alone, f"run.dir={folder}/alone"]], 1, folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_measuring_after_every_step_leaves_the_losses_as_they_are_bit_for_bit(runs: Path, name: str):
    assert len(losses(runs / f"{name}-off")) == 4
    assert losses(runs / f"{name}-off") == losses(runs / f"{name}-full")
    assert list(series(runs / f"{name}-full" / "metrics.jsonl", "perf/spectra_seconds")[0]) == [0, 1, 2, 3, 4]
    steps, shares = series(runs / f"{name}-full" / "metrics.jsonl", "perf/spectra_pct")
    assert list(steps) == [1, 2, 3, 4] and ((0 < shares) & (shares < 100)).all()
    assert not series(runs / f"{name}-off" / "metrics.jsonl", "perf/spectra_seconds")[0].size


@pytest.mark.parametrize("name", ["sltrain", "lost"])
def test_head_and_tail_are_logged_with_their_null(runs: Path, name: str):
    for share in ("head_share", "tail_share"):
        for suffix in ("", "_null"):
            steps, values = series(runs / f"{name}-full" / "metrics.jsonl", f"spectra/summary/all/{share}{suffix}_mean")
            assert steps[-1] == 4 and 0 <= values[-1] <= 1.01


@pytest.mark.parametrize("metric", ["left_nuclear_norm", "right_erank", "left_captured_quarter", "induced_erank"])
def test_the_gradients_of_every_method_with_factors_are_measured(runs: Path, metric: str):
    for name in ("sltrain", "lost"):
        steps, values = series(runs / f"{name}-full" / "metrics.jsonl", f"gradients/summary/all/{metric}_mean")
        if (name, metric) == ("lost", "induced_erank"):
            assert not steps.size  # its activation is between the factors
        else:
            assert steps[-1] == 4 and values[-1] > 0
    overlaps = series(runs / "dense-full" / "metrics.jsonl", "gradients/summary/all/overlap_mean")
    assert list(overlaps[0]) == [2, 3, 4] and ((0 < overlaps[1]) & (overlaps[1] < 1)).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_updates_of_every_method_are_measured(runs: Path, name: str):
    found = runs / f"{name}-full" / "metrics.jsonl"
    start, last = (
        series(found, f"updates/summary/all/spectral_norm_since_{since}_mean") for since in ("start", "last")
    )
    assert list(start[0]) == list(last[0]) == [1, 2, 3, 4]
    assert start[1][0] == last[1][0]  # nothing between W_0 and the first measurement
    assert (start[1][1:] != last[1][1:]).all()


def test_gradients_and_updates_are_those_of_one_process(runs: Path):
    alone, shared = (read_metrics(runs / name / "metrics.jsonl")[1] for name in ("alone", "sltrain-full"))
    assert alone["step"] == shared["step"] == 1
    measured = {name for name in alone["metrics"] if name.startswith(("gradients/summary", "updates/summary"))}
    assert len(measured) > 50
    for name in measured:
        assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-2), name


def test_two_processes_measure_what_one_does(runs: Path):
    alone, shared = (read_metrics(runs / name / "metrics.jsonl")[0] for name in ("alone", "sltrain-full"))
    assert alone["step"] == shared["step"] == 0
    measured = {name: value for name, value in alone["metrics"].items() if name.startswith(("spectra/", "hidden/"))}
    assert {name.rpartition("/")[0] for name in measured if name.startswith("hidden/")} == {
        f"hidden/{metric}" for metric in ("rankme", "rankme_centered", "mnn", "matent")
    }
    for name, value in measured.items():
        assert shared["metrics"][name] == pytest.approx(value, rel=1e-4), name
