"""After a power cut at any moment a run goes on from its newest checkpoint, and is exported and evaluated."""

import json
from itertools import cycle
from pathlib import Path

import power
import pytest
from crew import Command, together, train_all
from launching import ROOT

from lrtrain.checkpoint.checkpointer import damage_of, whole_checkpoints
from lrtrain.tracking.jsonl import read_metrics

pytestmark = pytest.mark.full

STEPS = 6
CUTS = {1: 8, 2: 4}
"""Moments that are tried, about so many by the number of processes."""


def use(script: str, *arguments: object, folder: Path) -> bool:
    """Whether a script does its work on what is left; else it says why in one sentence."""
    done = Command(ROOT / "scripts" / f"{script}.py", [str(a) for a in arguments], folder).result()
    if done.returncode:
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.returncode == 0


def saved(done: list[power.Sync]) -> str | None:
    """The name of the newest checkpoint that was complete, and its name synced, by the last of `done`."""
    folders = [sync.names["run/checkpoints"][0] for sync in done if "run/checkpoints" in sync.names][-1:]
    listed = next((sync.content for sync in reversed(done) if sync.inode in folders), {})
    return max((name for name in map(str, listed) if name.startswith("step-")), default=None)


def rows(run: Path) -> dict[int, dict[str, float | None]]:
    """What was logged by step, but for times and memory."""
    return {
        row["step"]: {name: value for name, value in row["metrics"].items() if not name.startswith("perf/")}
        for row in read_metrics(run / "metrics.jsonl")
    }


def check_what_is_left(root: Path, job: list[str], processes: int, promised: str | None, whole: dict):
    """Use, and resume, the run below `root`, of which the checkpoint `promised` was saved."""
    run = root / "run"
    sound = [path for path in whole_checkpoints(run / "checkpoints") if damage_of(path) is None]
    newest = sound[-1] if sound else None
    assert (newest.name if newest else "") >= (promised or "")
    if newest:
        step = int(newest.name.removeprefix("step-"))
        logged = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row["metrics"]]
        assert logged[:step] == [*range(1, step + 1)]
    exported = use("export", run, "--to", "hf-factorized", "--out", root / "before", folder=root)
    assert exported == use("evaluate", run, folder=root) == (newest is not None)
    done = Command(ROOT / "launch" / "pretrain.py", [*job, f"run.dir={run}"], root, processes).result()
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"going on from {newest}" in done.stdout if newest else "going on" not in done.stdout
    assert rows(run) == whole and json.loads((run / "summary.json").read_text())["step"] == STEPS
    assert use("export", run, "--to", "hf-dense", "--out", root / "after", folder=root)
    assert use("evaluate", run, folder=root)


@pytest.mark.parametrize("processes", CUTS)
def test_a_run_outlives_a_power_cut_at_any_moment(tmp_path: Path, tiny: list[str], processes: int, monkeypatch):
    """Whatever was not synced is lost; or all names are there, and files that were not synced have no bytes."""
    root, record = tmp_path / "disk", tmp_path / "record"
    root.mkdir()
    due = ["spectra.every=2", "eval.every=2", "checkpoint.every=2"]  # all at the same steps
    values = ["schedule=constant", "param.execution=factored", "checkpoint.keep=1", f"train.steps={STEPS}"]
    job = [*tiny, *values, *due, "resume=auto", "run.name=run"]
    monkeypatch.setenv("LRTRAIN_CACHE", str(root / "cache"))
    together(power.recorded, (train_all, ([[*job, f"run.dir={root}/run"]],), root, record), tmp_path, processes)
    done, whole = power.syncs(record), rows(root / "run")
    assert {"train/loss", "eval/loss"} <= whole[4].keys() and len(whole) == STEPS + 1
    moments = range(len(done), 0, -(len(done) // CUTS[processes]))
    for moment, names in zip(moments, cycle([False, True]), strict=False):
        left = tmp_path / f"{moment}-{names}"
        power.leave(done[:moment], root.stat().st_ino, left, names)
        monkeypatch.setenv("LRTRAIN_CACHE", str(left / "cache"))
        try:
            check_what_is_left(left, job, processes, saved(done[:moment]), whole)
        except BaseException:
            print(f"after {moment} of {len(done)} syncs, {'all names' if names else 'synced names'} there")
            raise
