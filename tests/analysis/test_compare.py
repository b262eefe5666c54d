"""The comparison of runs: its table says what is known of each, its front is the one that a definition gives."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from crew import Command, metrics_of
from launching import ROOT
from omegaconf import OmegaConf

from lrtrain.analysis.compare import pareto, read_row
from lrtrain.tracking.jsonl import JsonlTracker


def run(folder: Path, method: str, rank: int | None, loss: float, parameters: int, last: int = 4) -> Path:
    """The files of a run of 4 steps that has come to step `last`."""
    tracker = JsonlTracker(folder, "id")
    for step in range(1, last + 1):
        tracker.log(step, 1000 * step, metrics_of({"train/loss": loss + 4 - step, "eval/loss": loss + 4 - step}))
    tracker.log_spectra(last, {"model.layers.0.mlp.up_proj": np.geomspace(1, 0.1, 8)})
    tracker.finish({}, 0)
    config = {"param": {"name": method, "rank": rank}, "train": {"steps": 4}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    if last == 4:
        summary = {"rank": rank, "parameters": parameters, "memory_gib": parameters / 2e6, "tokens_per_second": 100.0}
        summary |= {"eval_perplexity": float(np.exp(loss)), "effective_rank": 7.5}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_the_front_is_of_points_that_no_other_beats():
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).integers(0, 12, (60, 2))]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    front = [points[place] for place in pareto(points)]
    assert front == sorted(set(points) - beaten)


def test_a_run_under_way_is_shown_as_such(tmp_path: Path):
    row = read_row(run(tmp_path / "a", "sltrain", 8, 3.0, 10, last=3))
    assert row.state == "at step 3 of 4" and row.rank == 8 and row.parameters is None and not row.finished
    assert row.eval_perplexity == np.exp(4.0)


@pytest.mark.full
def test_the_script_compares_all_runs_of_a_sweep(tmp_path: Path):
    sweep = tmp_path / "sweep"
    for rank, loss in ((16, 3.4), (32, 3.2), (64, 3.1)):
        run(sweep / f"lowrank-rank{rank}-0a", "lowrank", rank, loss + 0.1, 10**6 + 10**4 * rank)
        run(sweep / f"sltrain-rank{rank}-0b", "sltrain", rank, loss, 10**6 + 11_000 * rank)
    run(sweep / "dense-0c", "dense", None, 3.15, 2_500_000)
    run(sweep / "sltrain-rank128-0d", "sltrain", 128, 3.0, 2_000_000, last=2)
    done = Command(ROOT / "scripts" / "compare.py", [str(sweep)], tmp_path).result()
    assert done.returncode == 0, done.stderr
    out = sweep / "comparison"
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows][0] == "sltrain-rank64-0b" and len(rows) == 8
    assert "at step 2 of 4" in done.stdout and "at step 2 of 4" in (out / "comparison.md").read_text()
    for picture in ("tradeoffs.png", "curves.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG") and str(picture) in done.stdout
