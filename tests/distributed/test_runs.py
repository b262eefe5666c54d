"""Whole runs on real processes: the same losses on one and two, and exact resumption."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, TINY, command

from lrtrain.checkpoint import read_meta, whole_checkpoints
from lrtrain.tracking.jsonl import read_metrics, series

JOBS = str(ROOT / "tests" / "distributed" / "jobs.py")


def run_jobs(jobs: list[list[str]], processes: int, folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable] if processes == 1 else torchrun
    done = subprocess.run([*start, JOBS, json.dumps(jobs)], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def losses(run: Path) -> dict[int, float]:
    return dict(zip(*series(run / "metrics.jsonl", "train/loss"), strict=True))


def gap(one: dict[int, float], other: dict[int, float]) -> float:
    assert one.keys() == other.keys() and one
    return max(abs(one[step] - other[step]) for step in one)


# --- the same run on one process and on two ----------------------------------------------------------------------

# Layers that are revised several times within six steps.
REVISED = {
    "sst": ["param=sst", "param.iteration=2", "param.round=2", "param.warmup=2"],
    "relora": ["param=relora", "param.merge_every=2", "param.prune=0.8", "param.prune_by=magnitude"],
}
VARIANTS = {
    "dense": ["param=dense", "param.rank=null"],
    "lowrank": ["param=lowrank"],
    "sltrain-materialize": ["param=sltrain", "param.execution=materialize"],
    "sltrain-factored": ["param=sltrain", "param.execution=factored"],
    "sst": REVISED["sst"],
    "relora": [*REVISED["relora"], "schedule=cosine_restarts", "schedule.restart_warmup=1"],
    "nested-lasso": ["param=nested", "param.lasso=1e-2"],
    "nested-rank-1": ["param=nested", "param.rank=1", "param.lasso=1e-2"],  # fewer rows than processes
    "nested-shrinking": ["param=nested", "param.shrink_every=2", "param.shrink_threshold=0.2"],
    "sltrain-row-balanced": ["param=sltrain", "param.support=row_balanced", "param.execution=factored"],
    "sltrain-block": ["param=sltrain", "param.support=block", "param.block=16", "param.execution=factored"],
    "bf16": ["param=lowrank", "train.dtype=bf16"],
    "opt-tied": ["param=lowrank", "model.config.dropout=0.0"],
    "lost": ["param=lost", "param.density=0.1"],
    "dlr": ["param=dlr"],
    "cola": ["param=cola"],
    "cola-bottleneck-compile": [
        "param=cola",
        "train.recompute_every=1",
        "train.recompute_keep=bottleneck",
        "train.compile=true",
    ],
    "recompute-compile": ["param=sltrain", "param.execution=factored", "train.recompute_every=2", "train.compile=true"],
}


OPT = [
    "model=opt_125m",
    "model.vocab_size=384",
    "model.config.hidden_size=48",
    "model.config.word_embed_proj_dim=48",
    "model.config.ffn_dim=96",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
]
TOLERANCE = {"bf16": 0.02}


def base_of(name: str, tiny: list[str]) -> list[str]:
    """The tiny run, or for OPT the same with that architecture."""
    return [*OPT, *(o for o in tiny if not o.startswith("model"))] if name.startswith("opt") else tiny


@pytest.fixture(scope="module")
def variants(tmp_path_factory, cache, corpus) -> Path:
    """Every variant for 6 steps on one process, on two, and on two with two replicas of the model."""
    folder = tmp_path_factory.mktemp("variants")
    base = [*TINY, f"data.path={corpus}", "train.steps=6", "spectra.every=3", "optim.weight_decay=0.1"]

    def jobs(where: str, *more: str) -> list[list[str]]:
        return [
            [*base_of(name, base), *change, *more, f"run.dir={folder}/{where}-{name}"]
            for name, change in VARIANTS.items()
        ]

    run_jobs(jobs("one"), 1, folder)
    run_jobs(jobs("two") + jobs("hsdp", "engine.replicas=2")[:2], 2, folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_give_the_losses_of_one(variants: Path, name: str):
    assert gap(losses(variants / f"one-{name}"), losses(variants / f"two-{name}")) < TOLERANCE.get(name, 2e-5)


@pytest.mark.parametrize("name", ["dense", "lowrank"])
def test_replicated_shards_give_the_losses_of_one(variants: Path, name: str):
    assert gap(losses(variants / f"one-{name}"), losses(variants / f"hsdp-{name}")) < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_evaluate_and_measure_as_one(variants: Path, name: str):
    for key in ("eval/loss", "train/grad_norm", "spectra/summary/all/erank_mean"):
        (_, one), (_, two) = (series(variants / f"{n}-{name}" / "metrics.jsonl", key) for n in ("one", "two"))
        assert one == pytest.approx(two, rel=TOLERANCE.get(name, 1e-4)), key


def test_executions_recomputation_and_compilation_do_not_change_the_losses(variants: Path):
    reference = losses(variants / "one-sltrain-materialize")
    assert gap(reference, losses(variants / "one-sltrain-factored")) < 2e-5
    assert gap(reference, losses(variants / "one-recompute-compile")) < 2e-5
    assert gap(losses(variants / "one-cola"), losses(variants / "one-cola-bottleneck-compile")) < 2e-5


def test_a_run_directory_holds_what_it_should(variants: Path):
    run = variants / "two-lowrank"
    names = {p.name for p in run.iterdir()}
    assert {
        "tokenizer",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
        "plots",
        "run.json",
        "spectra",
    } <= names
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 6 and summary["tokens"] == 6 * 8 * 32 and summary["world_size"] == 2
    assert 0 < summary["parameters"] < summary["parameters_dense"]
    assert list((run / "plots").glob("*.png"))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["tokens"] == 6 * 8 * 32


# --- resuming ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, corpus) -> list[str]:
    """Overrides that read the corpus as `data=c4` reads C4: files of JSON lines, streamed."""
    folder = tmp_path_factory.mktemp("c4")
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    for name, part in {"train": texts[:100], "validation": texts[100:]}.items():
        for i in range(4):
            with gzip.open(folder / f"c4-{name}.{i:05d}-of-00004.json.gz", "wt") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in part[i::4])
    return [
        "data=c4",
        f"data.path={folder}/c4-train.*.json.gz",
        f"data.source.validation={folder}/c4-validation.*.json.gz",
        "data.validation_fraction=0.0",
        "data.streams=4",
    ]


@pytest.mark.parametrize("source", ["packed", "streamed", "opt-with-dropout", "shrinking"])
@pytest.mark.parametrize("source", ["packed", "streamed", "opt-with-dropout", "lost"])
def test_resuming_twice_in_a_row_across_an_epoch_edge_is_exact(
    tmp_path: Path, tiny: list[str], streamed: list[str], source: str
):
    """4 + 4 + 4 steps, an epoch ending in between, on the same world size bit for bit; then also on another one."""
    base = [*tiny, "train.batch_size=160", "train.micro_batch_size=80", "optim.weight_decay=0.1"]
    # a constant learning rate does not depend on train.steps, which the pieces set
    base += ["schedule=constant", "schedule.warmup=0.0"]
    base.append("param=lost" if source == "lost" else "param.execution=factored")
    base = base_of(source, base)
    if source == "opt-with-dropout":
        base.append("model.config.dropout=0.1")
    if source == "shrinking":  # at steps 3, 6, 9 and 12: each piece but the first starts with ranks of its own
        base.remove("param.execution=factored")
        base += ["param=nested", "param.shrink_every=3", "param.shrink_threshold=0.2"]
    if source == "streamed":
        base = [override for override in base if override != "data=local"] + streamed
    pieces = [[*base, f"run.dir={tmp_path}/pieces", "resume=auto", f"train.steps={steps}"] for steps in (4, 8, 12)]
    whole = [*base, f"run.dir={tmp_path}/whole", "train.steps=12"]
    run_jobs([*pieces, whole], 2, tmp_path)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 12

    if source == "opt-with-dropout":
        return  # dropout draws from (seed, step, process): another number of processes is another run
    first, last = whole_checkpoints(tmp_path / "pieces" / "checkpoints")
    assert (first.name, last.name) == ("step-00000008", "step-00000012")
    if source == "shrinking":
        assert max(read_meta(last)["ranks"].values()) < max(read_meta(first)["ranks"].values()) < 8
    alone = [*base, f"run.dir={tmp_path}/alone", f"resume={first}", "train.steps=12"]
    run_jobs([[*alone, "train.micro_batch_size=160"]], 1, tmp_path)
    found, expected = losses(tmp_path / "alone"), losses(tmp_path / "whole")
    assert found.keys() == {9, 10, 11, 12}
    assert max(abs(found[step] - expected[step]) for step in found) < 2e-5


@pytest.mark.parametrize("name", REVISED)
def test_resuming_between_and_at_revisions_is_exact(tmp_path: Path, tiny: list[str], name: str):
    """Stopped in the middle of an iteration, where a draw is due and where an SVD or merge is; on two processes."""
    base = [*tiny, *REVISED[name], "schedule=constant", "schedule.warmup=0.0", "spectra.every=1"]
    pieces = [[*base, f"run.dir={tmp_path}/pieces", "resume=auto", f"train.steps={n}"] for n in (3, 4, 6, 9)]
    run_jobs([*pieces, [*base, f"run.dir={tmp_path}/whole", "train.steps=9"]], 2, tmp_path)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 9


def test_a_shrunken_run_ends_with_fewer_parameters_and_a_loss_for_each_rank(variants: Path):
    kept, shrunken = (json.loads((variants / f"two-{name}" / "summary.json").read_text())
                      for name in ("nested-lasso", "nested-shrinking"))  # fmt: skip
    assert shrunken["parameters"] < kept["parameters"] and shrunken["parameters_dense"] == kept["parameters_dense"]
    for summary in (kept, shrunken):
        assert summary["eval_loss_at_rank_share_1"] == summary["eval_loss"]
        assert summary["parameters_at_rank_share_1"] == summary["parameters"]
        assert summary["parameters_at_rank_share_0.5"] < summary["parameters"]
        assert summary["eval_loss_at_rank_share_0.5"] != summary["eval_loss"]
    (newest,) = whole_checkpoints(variants / "two-nested-shrinking" / "checkpoints")
    assert set(read_meta(newest)["ranks"].values()) <= set(range(1, 8))


def start(overrides: list[str], processes: int, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(overrides, processes), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def logged_steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


def test_killed_at_ten_random_moments_it_loses_nothing_but_the_steps_since_the_last_checkpoint(
    tmp_path: Path, tiny: list[str]
):
    """SIGKILL while training or in the middle of a save; the resumed trace is the uninterrupted one bit for bit."""
    base = [*tiny, "train.steps=150", "checkpoint.every=4", "train.batch_size=2", "data.seq_len=16"]
    base.append("param.execution=factored")  # what `auto` measures may differ between the two runs
    run_jobs([[*base, f"run.dir={tmp_path}/whole"]], 1, tmp_path)
    run, dice = tmp_path / "killed", random.Random(0)
    job = [*base, f"run.dir={run}", "resume=auto"]
    for _ in range(10):
        before = whole_checkpoints(run / "checkpoints")
        steps = logged_steps(run)
        process = start(job, 1, tmp_path)
        wait_for(lambda: logged_steps(run) > steps, process)  # noqa: B023
        time.sleep(dice.uniform(0, 1.0))
        process.kill()
        process.wait()
        after = whole_checkpoints(run / "checkpoints")
        assert not before or after[-1].name >= before[-1].name
    done = subprocess.run(command(job, 1), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(tmp_path / "whole")
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_a_signal_to_one_process_saves_on_all_and_says_how_to_go_on(tmp_path: Path, tiny: list[str]):
    run = tmp_path / "run"
    job = [*tiny, "train.steps=100000", f"run.dir={run}", "resume=auto", "schedule=constant"]
    process = start(job, 2, tmp_path)
    wait_for(lambda: logged_steps(run) > 3, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [pid for pid in map(int, children) if b"pretrain.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    rank = {int(dict(e.split(b"=", 1) for e in Path(f"/proc/{p}/environ").read_bytes().split(b"\0") if e)[b"RANK"]): p
            for p in workers}  # fmt: skip
    os.kill(rank[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    saved = whole_checkpoints(run / "checkpoints")[-1]
    step = int(saved.name.removeprefix("step-"))
    assert f"at step {step} of 100000" in output and "resume=auto" in output and output.count("stopped by") == 1
    assert max(losses(run)) == step


def test_a_run_directory_is_never_overwritten(tmp_path: Path, tiny: list[str], launch):
    (tmp_path / "there").mkdir()
    done = launch([*tiny, f"run.dir={tmp_path}/there"])
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"run.dir={tmp_path}/there exists; go on with resume=auto, or choose another run.name or run.dir"
    )
    assert list((tmp_path / "there").iterdir()) == []


def test_a_loss_that_stays_infinite_ends_the_run_with_the_last_checkpoint_intact(
    tmp_path: Path, tiny: list[str], launch
):
    run = tmp_path / "run"
    good = [*tiny, f"run.dir={run}", "schedule=constant", "train.steps=4"]
    assert launch(good).returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")}
    bad = [*good, "resume=auto", "train.steps=50", "optim.lr=1e38", "train.clip=null", "train.max_skipped=3"]
    done = launch(bad)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "train.max_skipped=3" in done.stderr and "step-00000004" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (run / "checkpoints").rglob("*")} == before
