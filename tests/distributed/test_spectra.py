"""Looking at a model never changes what it becomes."""

import json
import math
import re
from pathlib import Path

import pytest
from launching import ROOT, TINY
from offline import of_type, segments
from runs import losses, run_jobs

from lrtrain.tracking.jsonl import read_metrics, series

pytestmark = pytest.mark.full

METHODS = {
    "dense": ["param=dense"],
    "sltrain": ["param=sltrain", "param.execution=factored"],
    "lost": ["param=lost"],
    "sst": ["param=sst", "param.iteration=2", "param.round=2", "param.warmup=2"],  # with random choices of its own
}
FULL = ["spectra=full", "spectra.every=1", "train.steps=2"]
# Together all that there is; power laws are fitted from 64 values.
SEEN = {
    "exact": [*FULL, *METHODS["sltrain"], "model.config.hidden_size=64"],
    "estimated": [*FULL, "param=dense", "spectra.exact_up_to=32", "spectra.hidden_by=top"],
}
MEASURED = {"off": ["spectra=off"], "full": ["spectra=full", "spectra.every=1"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    jobs = [
        [*TINY, f"data.path={corpus}", *method, *measured, "train.steps=3", f"run.dir={folder}/{name}-{how}"]
        for name, method in METHODS.items()
        for how, measured in MEASURED.items()
    ]
    base = [*TINY, f"data.path={corpus}"]
    top = [*base, *SEEN["estimated"], "train.micro_batch_size=2", f"run.dir={folder}/shared-estimated"]
    run_jobs([*jobs, top], 2, folder)
    alone = [*TINY, f"data.path={corpus}", *METHODS["sltrain"], *MEASURED["full"], "train.steps=1"]
    blocks = ["train.micro_batch_size=4", "tracking=wandb"]  # of as many rows as two processes have
    seen = [[*base, *change, *blocks, f"run.dir={folder}/seen-{name}"] for name, change in SEEN.items()]
    run_jobs([[*alone, f"run.dir={folder}/alone"], *seen], 1, folder)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_measuring_after_every_step_leaves_the_losses_as_they_are_bit_for_bit(runs: Path, name: str):
    assert len(losses(runs / f"{name}-off")) == 3
    assert losses(runs / f"{name}-off") == losses(runs / f"{name}-full")
    assert list(series(runs / f"{name}-full" / "metrics.jsonl", "perf/spectra_seconds")[0]) == [0, 1, 2, 3]
    steps, shares = series(runs / f"{name}-full" / "metrics.jsonl", "perf/spectra_pct")
    assert list(steps) == [1, 2, 3] and ((0 < shares) & (shares < 100)).all()
    assert not series(runs / f"{name}-off" / "metrics.jsonl", "perf/spectra_seconds")[0].size


@pytest.mark.parametrize("name", ["sltrain", "lost"])
def test_head_and_tail_are_logged_with_their_null(runs: Path, name: str):
    for share in ("head_share", "tail_share"):
        for suffix in ("", "_null"):
            steps, values = series(runs / f"{name}-full" / "metrics.jsonl", f"spectra/summary/all/{share}{suffix}_mean")
            assert steps[-1] == 3 and 0 <= values[-1] <= 1.01


@pytest.mark.parametrize("metric", ["left_nuclear_norm", "right_erank", "left_captured_quarter", "induced_erank"])
def test_the_gradients_of_every_method_with_factors_are_measured(runs: Path, metric: str):
    for name in ("sltrain", "lost"):
        steps, values = series(runs / f"{name}-full" / "metrics.jsonl", f"gradients/summary/all/{metric}_mean")
        if (name, metric) == ("lost", "induced_erank"):
            assert not steps.size  # its activation is between the factors
        else:
            assert steps[-1] == 3 and values[-1] > 0
    overlaps = series(runs / "dense-full" / "metrics.jsonl", "gradients/summary/all/overlap_mean")
    assert list(overlaps[0]) == [2, 3] and ((0 < overlaps[1]) & (overlaps[1] < 1)).all()


@pytest.mark.parametrize("name", METHODS)
def test_the_updates_of_every_method_are_measured(runs: Path, name: str):
    found = runs / f"{name}-full" / "metrics.jsonl"
    start, last = (
        series(found, f"updates/summary/all/spectral_norm_since_{since}_mean") for since in ("start", "last")
    )
    assert list(start[0]) == list(last[0]) == [1, 2, 3]
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


def test_two_processes_find_the_leading_direction_and_the_estimates_of_one(runs: Path):
    """At each measurement, of which each improves the one before."""
    rows = zip(*(read_metrics(runs / f"{how}-estimated" / "metrics.jsonl") for how in ("seen", "shared")), strict=True)
    compared: set[str] = set()
    for alone, shared in rows:
        names = {name for name in alone["metrics"] if name.startswith(("hidden/", "spectra/summary"))}
        compared |= {name.split("/")[1] for name in names if name.startswith("hidden/")}
        for name in names:
            assert shared["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-3), name
    assert compared == {"top_share", "mean_share", "mnn"}


def documented() -> set[str]:
    """`<section>/<metric>` of the tables of docs/spectra.md; its headings stand for sections of names."""
    sections = {"Hidden states": "hidden", "Gradients": "gradients", "Updates": "updates"}
    found = set()
    for chapter in (ROOT / "docs" / "spectra.md").read_text().split("\n## "):
        section = sections.get(chapter.partition("\n")[0], "spectra")
        for table in re.findall(r"^\| metric \|.*\n(?:\|.*\n)+", chapter, re.MULTILINE):
            for first, second in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
                names = re.findall("`(.+?)`", first)
                names = [names[0].rpartition("_")[0] + name if name[0] == "_" else name for name in names]
                names += [f"{name}_stderr" for name in names if "with `_stderr` appended" in second]
                found |= {f"{section}/{name.replace('…', end)}" for name in names for end in ("start", "last")}
    return found


def test_what_the_page_on_spectra_names_is_what_wandb_gets(runs: Path):
    """In offline files: each documented name, and no other."""
    page, logged = (ROOT / "docs" / "spectra.md").read_text(), set()
    for name in SEEN:
        (folder,) = segments(runs / f"seen-{name}")
        for key in {key for record in of_type(folder, "history") for key in record["item"]}:
            section, _, rest = key.partition("/")
            metric = rest.partition("/")[0] if section == "hidden" else rest.rpartition("/")[2].removesuffix("_mean")
            if section in ("spectra", "gradients", "updates", "hidden"):
                logged.add(f"{section}/{re.sub('^(left|right)_', '', metric)}")
            elif section == "spectra_meta" or key.startswith("perf/spectra"):
                assert key in page, key
    assert logged == documented()


def test_wandb_gets_what_the_parts_of_layers_contribute_too(runs: Path):
    (folder,) = segments(runs / "seen-exact")
    path, *_ = sorted(folder.glob("files/media/table/contributions/q_proj*.json"))
    table = json.loads(path.read_text())
    assert table["columns"][:3] == ["step", "layer", "index"] and len(table["data"]) == 2 * 64
    for *_, sigma, low_rank, sparse, low_rank_null, sparse_null in table["data"]:
        assert low_rank + sparse == pytest.approx(sigma, rel=1e-4, abs=1e-6)
        assert math.isfinite(low_rank_null + sparse_null)
