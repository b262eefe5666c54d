"""The comparison of methods: what it runs next, what it reports, and a small one from end to end."""

import json
import math
import subprocess
from pathlib import Path

import pytest
from crew import Command, metrics_of
from launching import ROOT, TINY

from lrtrain.analysis.compare_methods import (
    COLUMNS,
    Study,
    Trial,
    arm_styles,
    left_to_run,
    mean_and_range,
    plot_outcomes,
    read_outcome,
    read_results,
    runs_ahead,
    sweep_grid,
    table_rows,
)
from lrtrain.tracking.jsonl import JsonlTracker

STUDY = Study("s", [], {"a": []}, lrs=[2e-3, 1e-3, 4e-3], extensions=2, seeds=[0, 1, 2], folder=Path())


def follow(perplexity, study: Study = STUDY) -> list[tuple[float, int]]:
    """All runs of an arm whose perplexity is a function of learning rate and seed, in the order they are asked for."""
    results: dict[tuple[float, int], float] = {}
    while trials := left_to_run("a", results, study):
        results |= {(trial.lr, trial.seed): perplexity(trial.lr, trial.seed) for trial in trials}
    return list(results)


# --- what to run ---------------------------------------------------------------------------------------------------


def test_an_inner_best_is_run_with_all_seeds():
    runs = follow(lambda lr, seed: abs(lr - 2e-3) + seed)
    assert runs == [(1e-3, 0), (2e-3, 0), (4e-3, 0), (2e-3, 1), (2e-3, 2)]


@pytest.mark.parametrize(
    "perplexity,sweep,best",
    [
        (lambda lr, seed: 1 / lr, [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 1.6e-2),  # twice, and no further
        (lambda lr, seed: lr, [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4], 2.5e-4),
        (lambda lr, seed: abs(lr - 8e-3), [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], 8e-3),
        (lambda lr, seed: abs(lr - 5e-3), [1e-3, 2e-3, 4e-3, 8e-3], 4e-3),  # once: then the best is inside
        (lambda lr, seed: math.inf if lr > 1e-3 else lr, [1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4], 2.5e-4),
    ],
)
def test_a_best_at_the_end_extends_the_grid_at_that_end(perplexity, sweep, best):
    assert follow(perplexity) == [*((lr, 0) for lr in sweep), (best, 1), (best, 2)]


def test_an_arm_that_always_diverges_is_tried_lower_and_then_left():
    assert follow(lambda lr, seed: math.inf) == [(lr, 0) for lr in (1e-3, 2e-3, 4e-3, 5e-4, 2.5e-4)]


def test_a_grid_need_not_grow():
    study = Study("s", [], {}, [1e-3, 2e-3], extensions=0, seeds=[5], folder=Path())
    assert follow(lambda lr, seed: lr, study) == [(1e-3, 5), (2e-3, 5)]


def test_what_is_ahead_is_counted():
    assert runs_ahead({}, STUDY) == 5
    sweep = {(1e-3, 0): 3.0, (2e-3, 0): 1.0, (4e-3, 0): 2.0}
    assert runs_ahead(sweep, STUDY) == 2 and runs_ahead(sweep | {(2e-3, 1): 1.0, (2e-3, 2): 1.0}, STUDY) == 0
    assert sweep_grid(sweep, STUDY) == [1e-3, 2e-3, 4e-3]


# --- what to report ------------------------------------------------------------------------------------------------


def finish(folder: Path, trial: Trial, perplexity: float, **more) -> None:
    """The files of a finished run."""
    run_dir = folder / trial.name
    tracker = JsonlTracker(run_dir, "id")
    for step in (1, 2):
        tracker.log(step, 1000 * step, metrics_of({"eval/loss": math.log(perplexity) + 2 - step}))
    tracker.finish({}, 0)
    summary = {"eval_perplexity": perplexity, "parameters": 2_000_000, "tokens": 2000, "tokens_per_second": 100.0}
    summary |= {"optimizer_bytes": 3 * 2**20, "effective_rank": None, "skipped": 0}
    (run_dir / "summary.json").write_text(json.dumps(summary | more))


def diverge(folder: Path, trial: Trial) -> None:
    (folder / trial.name).mkdir(parents=True)
    (folder / trial.name / "diverged").write_text("at step 3\n")


def test_the_outcome_is_of_the_best_learning_rate(tmp_path: Path):
    study = Study("s", [], {"a": [], "a+b": []}, [1e-3, 2e-3, 4e-3], 0, [0, 1, 2], tmp_path)
    for lr, perplexity in [(1e-3, 30.0), (2e-3, 20.0)]:
        finish(tmp_path, Trial("a", lr, 0), perplexity)
    diverge(tmp_path, Trial("a", 4e-3, 0))
    finish(tmp_path, Trial("a", 2e-3, 1), 26.0, tokens_per_second=300.0, parameters_trainable=500_000)
    finish(tmp_path, Trial("a+b", 4e-3, 0), math.nan)
    finish(tmp_path, Trial("a", 2e-3, 2), 1.0, eval_perplexity=None)  # a signal cut its evaluation short
    assert read_results(study, "a") == {(1e-3, 0): 30, (2e-3, 0): 20, (4e-3, 0): math.inf, (2e-3, 1): 26}
    a, b = outcomes = [read_outcome(study, arm) for arm in study.arms]
    assert (a.lr, a.perplexities, a.complete, a.at_edge) == (2e-3, [20, 26], False, False)
    assert (b.lr, b.perplexities, b.sweep) == (None, [], {4e-3: math.inf})
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in table_rows(outcomes)]
    assert rows[0] == {
        "arm": "a",
        "parameters": "2.00 M / 0.50 M",
        "optimizer MiB": "3.0",
        "best lr": "0.002",
        "eval perplexity": "23.00 (20.00–26.00)",
        "seeds": "2",
        "tokens/s": "200",
        "effective rank": "-",
        "remarks": "not finished; diverged at lr 0.004 (seed 0)",
    }
    assert rows[1]["best lr"] == rows[1]["eval perplexity"] == "-"
    assert plot_outcomes(outcomes, "s", tmp_path / "s.png").stat().st_size > 10_000


def test_a_best_at_the_end_is_told(tmp_path: Path):
    study = Study("s", [], {"a": []}, [1e-3, 2e-3], 0, [0], tmp_path)
    for lr in study.lrs:
        finish(tmp_path, Trial("a", lr, 0), 1 / lr)
    outcome = read_outcome(study, "a")
    assert outcome.complete and outcome.at_edge and table_rows([outcome])[0][-1] == "best lr at the end of the grid"


def test_mean_and_range():
    assert mean_and_range([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"


def test_a_variant_shares_its_method_s_color():
    styles = arm_styles(["a", "b", "a+x", "a+y"])
    assert styles["a"]["color"] == styles["a+x"]["color"] != styles["b"]["color"]
    assert len({styles[arm]["ls"] for arm in ("a", "a+x", "a+y")}) == 3


# --- from end to end -----------------------------------------------------------------------------------------------


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return Command(ROOT / "scripts" / "compare_methods.py", ["--study", "study.yaml", *arguments], folder).result()


@pytest.mark.full
def test_a_study_runs_reports_and_runs_nothing_twice(cache: Path, corpus: Path, tmp_path: Path):
    common = [*TINY, f"data.path={corpus}", "train.steps=4", "train.max_skipped=1", "eval.every=2"]
    arms = {"lowrank": ["param=lowrank"], "none": ["param=none"]}
    study = {"name": "s", "common": common, "arms": arms, "lrs": [1e-3, 1e30], "extensions": 0, "seeds": [0, 1]}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    done = compare(tmp_path)
    assert done.returncode == 1 and "none could not be run: " in done.stderr and "param" in done.stderr, done.stderr
    folder = tmp_path / "runs" / "compare" / "s"
    trials = [folder / Trial("lowrank", *run).name for run in [(1e-3, 0), (1e-3, 1), (1e30, 0)]]
    assert sorted(path.parent for path in folder.glob("*/config.yaml")) == trials
    assert not [*folder.glob("*/checkpoints")] and (folder / "comparison.png").exists()
    assert (trials[2] / "diverged").exists() and not (trials[2] / "summary.json").exists()
    seeds = [json.loads((run / "summary.json").read_text())["eval_perplexity"] for run in trials[:2]]
    assert seeds[0] != seeds[1] and mean_and_range(seeds) in (folder / "comparison.md").read_text()

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    again = compare(tmp_path, "--arms", "lowrank")
    assert again.returncode == 0 and "seed0:" in done.stdout and "seed0:" not in again.stdout, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/metrics.jsonl")}
    other = compare(tmp_path, "--overrides", "train.steps=5")
    assert other.returncode == 1 and "holds runs of other overrides" in other.stderr
