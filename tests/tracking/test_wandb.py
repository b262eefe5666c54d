"""Offline W&B runs, read back."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from crew import metrics_of
from offline import STEP, history, of_type, segments

from lrtrain.config.schema import TrackingConfig
from lrtrain.tracking.wandb_sink import DEPTHS_SHOWN, WandbTracker, evenly, layer_metrics, shown_indices

pytest.importorskip("wandb")

SECRET = "0123456789abcdef0123456789abcdef01234567"
CONFIG = TrackingConfig(wandb="offline", project="p", entity=None, group="g", tags=["lowrank", "rank-4"])


@pytest.fixture(autouse=True)
def quiet_wandb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)


def open_run(run_dir: Path) -> WandbTracker:
    run_dir.mkdir(exist_ok=True)
    return WandbTracker(CONFIG, run_dir, "run-id", {"optim": {"lr": 1e-3}, "param": {"name": "sltrain"}})


def test_a_run_comes_back_as_it_was_logged(tmp_path: Path):
    run = open_run(tmp_path)
    for step in (10, 20):
        run.log(step, 100 * step, metrics_of({"train/loss": 4.0 - step / 10}))
    run.finish({"eval/loss": 1.5, "method": "lowrank"}, exit_code=0)

    (folder,) = segments(tmp_path)
    assert history(folder, "train/loss") == [(10, 3.0), (20, 2.0)]
    assert history(folder, "train/tokens") == [(10, 1000), (20, 2000)]
    (about,) = of_type(folder, "run")
    assert about["run_id"] == "run-id"
    assert about["tags"] == ["lowrank", "rank-4", "sltrain"]
    assert (about["run_group"], about["job_type"]) == ("g", "sltrain")
    metrics = of_type(folder, "metric")
    assert any(metric.get("glob_name") == "*" and metric["step_metric"] == STEP for metric in metrics)
    assert of_type(folder, "exit")[0]["exit_code"] == 0
    summaries = [record["update"] for record in of_type(folder, "summary")]
    assert {"eval/loss": 1.5, "method": "lowrank"} in summaries


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path: Path):
    for first_step in (1, 2):  # the second start repeats step 2, as after a crash
        run = open_run(tmp_path)
        for step in (first_step, first_step + 1):
            run.log(step, step, metrics_of({"train/loss": float(step)}))
        run.finish({}, exit_code=0)
        time.sleep(1.1)  # wandb names folders by the second

    first, second = segments(tmp_path)
    assert {of_type(folder, "run")[0]["run_id"] for folder in (first, second)} == {"run-id"}
    assert history(first, "train/loss") == [(1, 1), (2, 2)]
    assert history(second, "train/loss") == [(2, 2), (3, 3)]


@pytest.mark.full
def test_a_killed_process_loses_little(tmp_path: Path):
    program = f"""
import time
from itertools import pairwise
from pathlib import Path
import numpy as np
from lrtrain.config.schema import TrackingConfig
from lrtrain.core.metrics import Metric
from lrtrain.tracking.wandb_sink import WandbTracker
config = TrackingConfig("offline", "p", None, None, [])
run = WandbTracker(config, Path({str(tmp_path)!r}), "run-id", {{}})
for step in range(10):
    run.log_spectra(step, {{"layers.0.q_proj": np.ones(8)}})
    run.log(step, step, [Metric("train", None, "loss", 1.0), Metric("spectra", "layers.0.q_proj", "erank", 8.0)])
time.sleep(3)
print("flushed", flush=True)
time.sleep(60)
"""
    # Without this the child would write through this process's wandb service, which is not killed with it.
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flushed\n"
        process.send_signal(signal.SIGKILL)
    (folder,) = segments(tmp_path)
    assert len(history(folder, "train/loss")) >= 9  # wandb holds the last row open
    assert len(history(folder, "spectra/layers.0.q_proj/erank")) >= 9
    for files in ("table/layers/spectra*.json", "table/spectra_curves/q_proj*.json", "images/layers/erank*.png"):
        assert len([*folder.glob(f"files/media/{files}")]) >= 9, files


def test_spectra_are_a_table_and_a_chart_per_projection(tmp_path: Path):
    run = open_run(tmp_path)
    sigma = np.geomspace(3, 0.1, 200)
    run.log_spectra(5, {"layers.0.q_proj": sigma, "layers.1.q_proj": sigma, "layers.0.up_proj": sigma})
    run.finish({}, exit_code=0)

    (path,) = segments(tmp_path)[0].glob("files/media/table/spectra_curves/q_proj_table*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "layer", "index", "sigma"]
    assert len(table["data"]) == 2 * len(shown_indices(200))
    assert table["data"][0] == [5, "layers.0.q_proj", 0, 3.0]
    charts = json.dumps(of_type(segments(tmp_path)[0], "config"))
    assert "spectra_curves/q_proj" in charts and "spectra_curves/up_proj" in charts


def of_layers(depth: int) -> dict[str, float]:
    return {f"spectra/layers.{i}.{p}/erank": i + 0.5 for i in range(depth) for p in ("q_proj", "up_proj")}


def test_metrics_of_layers_are_scalars_a_table_and_a_heatmap(tmp_path: Path):
    run = open_run(tmp_path)
    for step in (0, 10):
        run.log(
            step,
            step,
            metrics_of(of_layers(20) | {"spectra/summary/all/erank_mean": 1.0, "gradients/layers.0.q_proj/erank": 2.0}),
        )
    run.finish({}, exit_code=0)

    (folder,) = segments(tmp_path)
    for depth in (0, 3, 19):
        assert history(folder, f"spectra/layers.{depth}.q_proj/erank") == [(0, depth + 0.5), (10, depth + 0.5)]
    scalars = {
        key for record in of_type(folder, "history") for key in record["item"] if key.startswith("spectra/layers")
    }
    assert len(scalars) == 2 * DEPTHS_SHOWN
    assert history(folder, "spectra/summary/all/erank_mean") == [(0, 1.0), (10, 1.0)]
    for path in folder.glob("files/media/table/layers/spectra*.json"):
        table = json.loads(path.read_text())
        assert table["columns"] == ["step", "layer", "projection", "depth", "erank"]
        assert table["data"][3][1:] == ["layers.1.up_proj", "up_proj", 1, 1.5] and len(table["data"]) == 40
    assert len([*folder.glob("files/media/table/layers/spectra*.json")]) == 2
    assert len([*folder.glob("files/media/table/layers/gradients*.json")]) == 2
    assert len([*folder.glob("files/media/images/layers/erank*.png")]) == 2
    assert history(folder, "layers/erank._type") == [(0, "image-file"), (10, "image-file")]


def test_tables_become_rare_and_the_last_ones_are_there(tmp_path: Path):
    """Scalars are logged at each of 120 measurements, and tables first at each, then ever more rarely."""
    run = open_run(tmp_path)
    steps = [*range(120)]
    for step in steps:
        run.log(step, step, metrics_of({"gradients/layers.0.q_proj/norm": 2.0}))
        run.log_spectra(step, {"layers.0.q_proj": np.ones(2)})
    run.finish({}, exit_code=0)

    (folder,) = segments(tmp_path)
    assert history(folder, "gradients/layers.0.q_proj/norm") == [(step, 2.0) for step in steps]
    for table in ("layers/gradients", "spectra_curves/q_proj"):
        files = [json.loads(path.read_text()) for path in folder.glob(f"files/media/table/{table}*.json")]
        shown = sorted(row["data"][0][0] for row in files)
        assert shown[:11] == steps[:11] and shown[-1] == steps[-1]
        assert all(following <= 1.1 * step + 1 for step, following in pairwise(shown[1:]))
        assert len(shown) == len({*shown}) <= 11 + math.log(119 / 10, 1.1) + 1


def test_a_few_layers_are_all_shown():
    assert evenly([0, 1, 2], 8) == [0, 1, 2]
    assert evenly(list(range(32)), 8) == [0, 4, 9, 13, 18, 22, 27, 31]
    others = {"train/loss": 1.0, "spectra_meta/nonfinite": 0.0, "spectra/summary/all/erank_mean": 2.0}
    found = layer_metrics(metrics_of({**of_layers(1), **others}))
    assert found == {"spectra": {"layers.0.q_proj": {"erank": 0.5}, "layers.0.up_proj": {"erank": 0.5}}}


def test_images_are_kept_with_their_step(tmp_path: Path):
    from matplotlib.figure import Figure

    picture = tmp_path / "picture.png"
    Figure(figsize=(1, 1)).savefig(picture)
    run = open_run(tmp_path)
    run.log_image(7, "plots/summary", picture)
    run.finish({}, exit_code=0)
    folder = segments(tmp_path)[0]
    assert list(folder.glob("files/media/images/plots/summary*.png"))
    assert history(folder, "plots/summary._type") == [(7, "image-file")]


def test_the_api_key_stays_out_of_the_run_directory(tmp_path: Path):
    run = open_run(tmp_path)
    run.log(1, 1, metrics_of({"train/x": 1.0}))
    run.finish({}, exit_code=0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("length", [1, 16, 64, 65, 128, 2048])
def test_shown_indices_hold_the_head_and_the_last(length: int):
    shown = shown_indices(length)
    assert len(shown) <= 64
    assert shown[0] == 0 and shown[-1] == length - 1
    assert set(range(min(16, length))) <= set(shown.tolist())
