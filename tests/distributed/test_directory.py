"""The directory of a run: who has it, what is brought up to date in it, and what damage to it costs."""

import json
import os
import shutil
from pathlib import Path

import pytest
from crew import Command
from launching import ROOT
from runs import logged_steps, losses, start, wait_for

from lrtrain.analysis.compare import read_row
from lrtrain.checkpoint.checkpointer import damage_of, whole_checkpoints
from lrtrain.checkpoint.meta import read_meta
from lrtrain.tracking.jsonl import read_metrics

pytestmark = pytest.mark.full

CONSTANT = ["schedule=constant", "schedule.warmup=0.0", "param.execution=factored", "optim.lr=0.003"]


def go(overrides: list[str], folder: Path, processes: int = 1) -> str:
    """The user's command to its good end; what it says."""
    done = Command(ROOT / "launch" / "pretrain.py", overrides, folder, processes).result()
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def finished(tmp_path: Path, tiny: list[str]) -> list[str]:
    """Overrides that resume a run of two steps in `tmp_path / "run"`."""
    job = [*tiny, *CONSTANT, f"run.dir={tmp_path}/run", "run.name=a", "resume=auto"]
    go([*job, "train.steps=2"], tmp_path)
    return job


def test_damaged_small_files_are_repaired_from_the_checkpoint(tmp_path: Path, finished: list[str]):
    """As a full disk or a power cut leaves them; what follows is the same, and the run has the same identity."""
    run = tmp_path / "run"
    identity = json.loads((run / "run.json").read_text())["id"]
    tokenizer = {path.name: path.read_bytes() for path in (run / "tokenizer").iterdir()}
    (run / "run.json").write_text("")
    (run / "config.yaml").write_text("{{{")
    for path in (run / "tokenizer").iterdir():
        path.write_text("")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 30 + b"\n")
    said = go([*finished, "train.steps=4"], tmp_path)
    assert f"{run}/run.json is damaged and is rewritten" in said and f"{run}/config.yaml is damaged" in said
    assert "metrics.jsonl: line" in said and "Traceback" not in said
    assert json.loads((run / "run.json").read_text())["id"] == identity
    assert {path.name: path.read_bytes() for path in (run / "tokenizer").iterdir()} == tokenizer
    assert [*losses(run)] == [1, 2, 3, 4] and len({row["run_id"] for row in read_metrics(run / "metrics.jsonl")}) == 1
    shutil.rmtree(run / "tokenizer")
    (run / "run.json").unlink()
    go([*finished, "train.steps=5"], tmp_path)
    assert {path.name: path.read_bytes() for path in (run / "tokenizer").iterdir()} == tokenizer
    assert json.loads((run / "run.json").read_text())["id"] == identity


def test_what_bears_the_name_of_a_runs_file_or_folder_is_named(tmp_path: Path, tiny: list[str], launch):
    for name, make in (("lock", Path.mkdir), ("checkpoints", Path.touch), ("run.json", Path.mkdir)):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        make(folder / name)
        done = launch([*tiny, f"run.dir={folder}", "resume=auto"])
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{folder / name} is a f") and "move it away" in done.stderr


def test_other_values_are_told_and_rewrite_the_configuration(tmp_path: Path, finished: list[str]):
    """config.yaml, which compare.py reads, has the values that the run has now; those before are kept."""
    run = tmp_path / "run"
    said = go([*finished, "train.steps=4", "optim.lr=0.002"], tmp_path)
    assert "resuming with other values: optim.lr=0.002 (before: 0.003), train.steps=4 (before: 2)" in said
    assert read_row(run).state == "finished" and "lr: 0.002" in (run / "config.yaml").read_text()
    assert "lr: 0.003" in (run / "config-step-00000002.yaml").read_text()
    before = (run / "config.yaml").stat().st_mtime_ns
    assert "other values" not in go([*finished, "train.steps=4", "optim.lr=0.002"], tmp_path)
    assert (run / "config.yaml").stat().st_mtime_ns == before


def test_a_finished_run_is_told_as_such_and_evaluated_once(tmp_path: Path, finished: list[str]):
    said = go([*finished, "train.steps=2", "eval.every=2"], tmp_path)
    assert "at step 2; train.steps=2 leaves no step to take" in said and said.count("\neval 2/2") == 1


def test_another_optimizer_is_refused_by_name(tmp_path: Path, finished: list[str], launch):
    done = launch([*finished, "optim=muon", "train.steps=4"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "optim is adamw there and muon here" in done.stderr


def test_a_run_beside_that_may_have_been_meant_is_told(tmp_path: Path, tiny: list[str], launch):
    """And a longer run, or one that is measured more often, is the same run."""
    job = [*tiny, *CONSTANT, "resume=auto"]
    first = launch([*job, "train.steps=2"])
    assert first.returncode == 0, first.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert f"run {run.name} in runs/{run.name}" in first.stdout and "starts anew" not in first.stdout
    longer = launch([*job, "train.steps=3", "eval.every=2", "checkpoint.every=1"])
    assert "at step 2" in longer.stdout and [*(tmp_path / "runs").iterdir()] == [run]
    other = launch([*job, "train.steps=2", "optim.lr=0.002"])
    assert f"To resume {run.name} give run.name={run.name}" in other.stdout
    assert "optim.lr=0.003 there and 0.002 here" in other.stdout


def test_of_two_fresh_starts_at_once_the_refused_one_leaves_no_trace(tmp_path: Path, tiny: list[str]):
    run = tmp_path / "run"
    jobs = [[*tiny, f"run.dir={run}", "resume=auto", "train.steps=4", f"optim.lr={lr}"] for lr in (0.001, 0.009)]
    both = [Command(ROOT / "launch" / "pretrain.py", job, tmp_path) for job in jobs]
    ended = [command.result() for command in both]
    assert sorted(one.returncode for one in ended) == [0, 2]
    won = [one.returncode for one in ended].index(0)
    assert "is in use by a run that has not ended" in ended[1 - won].stderr
    lr = read_meta(whole_checkpoints(run / "checkpoints")[-1]).config["optim"]["lr"]
    assert lr == (0.001, 0.009)[won] and f"lr: {lr}" in (run / "config.yaml").read_text()


def test_a_start_that_fails_early_leaves_no_directory(tmp_path: Path, tiny: list[str], launch):
    done = launch([*tiny, f"run.dir={tmp_path}/run", "data.tokenizer.vocab_size=400"])
    assert done.returncode == 2 and "model.vocab_size=384 is below" in done.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()  # of one that was killed while it prepared its data
    assert launch([*tiny, f"run.dir={tmp_path}/run", "train.steps=1"]).returncode == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_directory_is_removed_ends_and_its_name_is_free(tmp_path: Path, tiny: list[str], processes: int):
    run = tmp_path / "run"
    job = [*tiny, *CONSTANT, f"run.dir={run}", "resume=auto", "checkpoint.every=2"]
    first = start([*job, "train.steps=100000"], processes, tmp_path)
    wait_for(lambda: logged_steps(run) > 6, first)
    os.rename(run, tmp_path / "doomed")  # at once, as no rmtree of what is being written
    shutil.rmtree(tmp_path / "doomed")
    second = start([*job, "train.steps=4"], processes, tmp_path)
    assert first.wait(60) == 1
    said, _ = first.communicate()
    assert said.count(f"run.dir={run} was removed or moved while it trained") == 1 and "Traceback" not in said
    assert second.wait(120) == 0 and [*losses(run)] == [1, 2, 3, 4]
    assert all(damage_of(checkpoint) is None for checkpoint in whole_checkpoints(run / "checkpoints"))
