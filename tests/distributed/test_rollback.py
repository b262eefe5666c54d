"""A run that met bad data and went back is the run that never met it, bit for bit, on two processes."""

import math
from pathlib import Path

import pytest
import torch
from crew import crew, train
from runs import losses

from lrtrain.checkpoint import read_meta, whole_checkpoints
from lrtrain.data.loader import PackedTrain
from lrtrain.tracking.jsonl import series

BAD = range(120, 128)  # the batch of step 16
LEFT_OUT = [112, 128]  # and the one before it


def on_bad_data(jobs: list[list[str]], bad: range) -> None:
    """The rows at some positions are all one token that is nowhere else."""
    batch = PackedTrain.batch

    def with_bad_rows(self, position: int, batch_size: int, *place: int) -> torch.Tensor:
        rows = batch(self, position, batch_size, *place)
        return torch.full_like(rows, 1) if position in bad else rows

    PackedTrain.batch = with_bad_rows
    for job in jobs:
        train(job)


def on_other_data(jobs: list[list[str]]) -> None:
    """The data has no rows at the positions that are left out."""
    batch = PackedTrain.batch

    def without(self, position: int, *others: int) -> torch.Tensor:
        first, end = LEFT_OUT
        return batch(self, position if position < first else position + end - first, *others)

    PackedTrain.batch = without
    for job in jobs:
        train(job)


@pytest.fixture
def base(tiny: list[str]) -> list[str]:
    return [
        *[override for override in tiny if not override.startswith("checkpoint.every")],
        "param.execution=factored",
        "schedule=constant",
        "schedule.warmup=0.0",
        "train.micro_batch_size=4",
        "checkpoint.every=3",
        "checkpoint.keep=4",
        "rollback.spike=4",
        "rollback.window=6",
        "rollback.skip=2",
    ]


def test_a_run_that_left_out_a_spike_is_one_that_never_saw_those_batches(tmp_path: Path, base: list[str]):
    """Also when it stops and goes on after the rollback: what is left out is in the checkpoint."""
    halves = [[*base, f"run.dir={tmp_path}/halves", "resume=auto", f"train.steps={steps}"] for steps in (18, 20)]
    spiked = [*base, f"run.dir={tmp_path}/spiked", "train.steps=20"]
    (tmp_path / "other").mkdir()
    teams = [
        crew(on_bad_data, ([spiked, *halves], BAD), tmp_path),
        crew(on_other_data, ([[*base, f"run.dir={tmp_path}/never", "train.steps=20"]],), tmp_path / "other"),
    ]
    for member in [*teams[0], *teams[1]]:
        member.join(240)
        assert member.exitcode == 0, (tmp_path / "0.txt").read_text()
    said = (tmp_path / "0.txt").read_text()
    assert said.count("going back to") == 2
    assert f"going back to {tmp_path}/spiked/checkpoints/step-00000012 and on without the sequences 112 … 127" in said
    never = losses(tmp_path / "never")
    assert len(never) == 20 and losses(tmp_path / "spiked") == losses(tmp_path / "halves") == never
    for run in ("spiked", "halves"):
        progress = read_meta(whole_checkpoints(tmp_path / run / "checkpoints")[-1])["progress"]
        assert progress["left_out"] == [LEFT_OUT] and progress["position"] == 20 * 8 + 16
        assert series(tmp_path / run / "metrics.jsonl", "train/rollbacks")[1].tolist() == [1]


def test_rollbacks_are_bounded_and_without_a_checkpoint_there_is_none(tmp_path: Path, base: list[str]):
    job = [*base, "train.steps=40", "train.micro_batch_size=8", "rollback.most=2"]
    (alone,) = crew(on_bad_data, ([[*job, f"run.dir={tmp_path}/bounded"]], range(120, 10**6)), tmp_path, 1)
    alone.join(300)
    said = (tmp_path / "0.txt").read_text()
    assert alone.exitcode == 1 and said.count("going back to") == 2
    assert (
        "Diverged: step 15: the loss" in said and "after rollback.most=2 rollbacks; the last good checkpoint is" in said
    )

    job += ["checkpoint.every=0", "train.steps=18", f"run.dir={tmp_path}/no"]
    (alone,) = crew(on_bad_data, ([job], BAD), tmp_path, 1)
    alone.join(300)
    assert alone.exitcode == 0
    assert "there is no checkpoint from before it to go back to" in (tmp_path / "0.txt").read_text()
    assert all(map(math.isfinite, losses(tmp_path / "no").values()))
