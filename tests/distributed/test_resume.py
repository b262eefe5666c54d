"""Exact resumption: on the same number of processes bit for bit, wherever a run was stopped or killed."""

import gzip
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from launching import TINY
from runs import REVISED, base_of, logged_steps, losses, run_jobs, start, torchrun, wait_for, workers

from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.checkpoint.meta import read_meta

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def streamed(tmp_path_factory, corpus) -> list[str]:
    """Overrides that read the corpus as `data=c4` reads C4: files of JSON lines, streamed."""
    folder = tmp_path_factory.mktemp("c4")
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    for name, part in {"train": texts[:20], "validation": texts[100:]}.items():
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


RESUMED = {
    "sltrain": ["param.execution=factored"],
    "streamed": ["param.execution=factored"],
    "opt-with-dropout": ["param.execution=factored", "model.config.dropout=0.1"],
    "lost": ["param=lost"],
    # At steps 3, 6, 9 and 12: each piece but the first starts with ranks of its own.
    "shrinking": ["param=nested", "param.shrink_every=3", "param.shrink_threshold=0.2"],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, cache: Path, corpus: Path, streamed: list[str]) -> Path:
    """4 + 4 + 4 steps, an epoch ending in between, and 12; the last four again on one process."""
    folder = tmp_path_factory.mktemp("resumed")
    together, alone = [], []
    for name, more in RESUMED.items():
        base = [*TINY, f"data.path={corpus}/?0?.txt", "train.batch_size=32", "train.micro_batch_size=16"]
        # a constant learning rate does not depend on train.steps, which the pieces set
        base += ["optim.weight_decay=0.1", "spectra=off", *more, "schedule=constant", "schedule.warmup=0.0"]
        base = base_of(name, base)
        if name == "streamed":
            base = [override for override in base if override != "data=local"] + streamed
        pieces = [*base, f"run.dir={folder}/{name}/pieces", "resume=auto"]
        together += [[*pieces, f"train.steps={steps}"] for steps in (4, 8, 12)]
        together.append([*base, f"run.dir={folder}/{name}/whole", "train.steps=12"])
        if name != "opt-with-dropout":  # which draws from (seed, step, process): on another number it is another run
            first = folder / name / "pieces" / "checkpoints" / "step-00000008"
            again = [*base, f"run.dir={folder}/{name}/alone", f"resume={first}", "train.steps=12"]
            alone.append([*again, "train.micro_batch_size=32"])
    run_jobs(together, 2, folder)
    run_jobs(alone, 1, folder)
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_twice_in_a_row_across_an_epoch_edge_is_exact(resumed: Path, name: str):
    """On the same world size bit for bit; then also on another one."""
    pieces, expected = resumed / name / "pieces", losses(resumed / name / "whole")
    assert losses(pieces) == expected and len(expected) == 12
    first, last = whole_checkpoints(pieces / "checkpoints")
    assert (first.name, last.name) == ("step-00000008", "step-00000012")
    if name == "shrinking":
        assert max(read_meta(last).ranks.values()) < max(read_meta(first).ranks.values()) < 8
    if name != "opt-with-dropout":
        found = losses(resumed / name / "alone")
        assert found.keys() == {9, 10, 11, 12}
        assert max(abs(found[step] - expected[step]) for step in found) < 2e-5


def test_an_execution_that_was_measured_elsewhere_or_is_given_is_not_taken_over(tmp_path: Path, tiny: list[str]):
    """There is no factored execution in bfloat16 on a CPU: a run that goes on so settles anew."""
    run, other = tmp_path / "run", tmp_path / "other"
    base = [*tiny, "schedule=constant", f"run.dir={run}", "resume=auto"]
    jobs = [[*base, "train.steps=1", "param.execution=factored"]]
    jobs += [[*base, "train.steps=2", "param.execution=auto"], [*base, "train.steps=3", "param.execution=materialize"]]
    first = f"resume={run}/checkpoints/step-00000001"
    jobs.append([*tiny, f"run.dir={other}", first, "train.steps=2", "param.execution=auto", "train.dtype=bf16"])
    run_jobs([[*job, "checkpoint.keep=3"] for job in jobs], 1, tmp_path)
    metas = [
        read_meta(checkpoint) for folder in (run, other) for checkpoint in whole_checkpoints(folder / "checkpoints")
    ]
    executions = [set(meta.executions.values()) for meta in metas]
    assert executions == [{"factored"}, {"factored"}, {"materialize"}, {"materialize"}]
    assert [meta.executed for meta in metas] == ["torch.float32 on cpu"] * 3 + ["torch.bfloat16 on cpu"]


def test_resuming_between_and_at_revisions_is_exact(tmp_path: Path, tiny: list[str]):
    """Stopped in the middle of an iteration, where a draw is due and where an SVD or merge is; on two processes."""
    jobs = []
    for name, more in REVISED.items():
        base = [*tiny, *more, "schedule=constant", "schedule.warmup=0.0", "spectra.every=3"]
        pieces = [*base, f"run.dir={tmp_path}/{name}/pieces", "resume=auto"]
        jobs += [[*pieces, f"train.steps={steps}"] for steps in (3, 4, 6, 9)]
        jobs.append([*base, f"run.dir={tmp_path}/{name}/whole", "train.steps=9"])
    run_jobs(jobs, 2, tmp_path)
    for name in REVISED:
        whole = losses(tmp_path / name / "whole")
        assert losses(tmp_path / name / "pieces") == whole and len(whole) == 9, name


def test_killed_at_random_moments_it_loses_nothing_but_the_steps_since_the_last_checkpoint(
    tmp_path: Path, tiny: list[str], launch
):
    """The user's command (`test_kills.py` kills two processes); the resumed trace is the uninterrupted one."""
    base = [*tiny, "train.steps=100", "checkpoint.every=4", "train.batch_size=4", "data.seq_len=16"]
    base.append("param.execution=factored")  # what `auto` measures may differ between the two runs
    run_jobs([[*base, f"run.dir={tmp_path}/whole"]], 1, tmp_path)
    run, dice = tmp_path / "killed", random.Random(0)
    job = [*base, f"run.dir={run}", "resume=auto"]
    for _ in range(3):
        before = whole_checkpoints(run / "checkpoints")
        steps = logged_steps(run)
        process = start(job, 1, tmp_path)
        wait_for(lambda: logged_steps(run) > steps, process)  # noqa: B023
        time.sleep(dice.uniform(0, 1.0))
        process.kill()
        process.wait()
        after = whole_checkpoints(run / "checkpoints")
        assert not before or after[-1].name >= before[-1].name
    done = launch(job)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(tmp_path / "whole")
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []


def test_a_signal_to_one_process_saves_on_all_and_says_how_to_go_on(
    tmp_path: Path, tiny: list[str], streamed: list[str]
):
    """The next batch of the stream has been read by then, on one process or on both: it is not lost."""
    run = tmp_path / "run"
    base = [
        *(o for o in tiny if o != "data=local"),
        *streamed,
        "param.execution=factored",
        "schedule=constant",
        "schedule.warmup=0.0",
    ]
    job = [*base, f"run.dir={run}", "resume=auto"]
    process = torchrun([*job, "train.steps=100000"], 2, tmp_path)
    wait_for(lambda: logged_steps(run) > 3, process)
    os.kill(workers(process)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    saved = whole_checkpoints(run / "checkpoints")[-1]
    step = int(saved.name.removeprefix("step-"))
    assert f"at step {step} of 100000" in output and "resume=auto" in output and output.count("stopped by") == 1
    assert max(losses(run)) == step
    run_jobs([[*one, f"train.steps={step + 3}"] for one in (job, [*base, f"run.dir={tmp_path}/whole"])], 2, tmp_path)
    assert losses(run) == losses(tmp_path / "whole")


def test_a_run_directory_is_never_overwritten(tmp_path: Path, tiny: list[str], launch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes").touch()
    done = launch([*tiny, f"run.dir={tmp_path}/there"])
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"run.dir={tmp_path}/there exists; go on with resume=auto, or choose another run.name or run.dir"
    )
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes"]


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


def test_a_second_run_on_the_same_directory_is_refused_and_the_first_goes_on(tmp_path: Path, tiny: list[str], launch):
    run = tmp_path / "run"
    job = [*tiny, "train.steps=100000", f"run.dir={run}", "resume=auto", "schedule=constant"]
    first = start(job, 1, tmp_path)
    wait_for(lambda: logged_steps(run) > 3, first)
    second = launch(job)
    assert second.returncode == 2
    assert second.stderr.strip() == (f"run.dir={run} is in use by a run that has not ended; choose another run.name")
    steps = logged_steps(run)
    wait_for(lambda: logged_steps(run) > steps, first)
    first.kill()
    first.wait()
    done = launch([*job, "train.steps=1", "tracking=none"])  # the lock went with its process
    assert done.returncode == 0, done.stderr


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(tmp_path: Path, tiny: list[str], launch):
    base = [*tiny, "schedule=constant", "param.execution=factored", "checkpoint.every=2"]
    run = tmp_path / "damaged"
    whole = [*base, f"run.dir={tmp_path}/whole", "train.steps=6"]
    run_jobs([whole, [*base, f"run.dir={run}", "train.steps=4"]], 2, tmp_path)
    newest = whole_checkpoints(run / "checkpoints")[-1]
    shard = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = launch([*base, f"run.dir={run}", "resume=auto", "train.steps=6"], processes=2)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged and left aside: {shard.name} is missing or not as it was written" in done.stderr
    assert losses(run) == losses(tmp_path / "whole")
