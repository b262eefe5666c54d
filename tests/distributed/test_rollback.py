"""A run that met bad data and went back is the run that never met it, bit for bit, on two processes."""

import math
from pathlib import Path

import pytest
import torch
from crew import crew, together, train
from runs import losses

from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.checkpoint.meta import read_meta
from lrtrain.data.loader import PackedTrain
from lrtrain.tracking.jsonl import series

pytestmark = pytest.mark.full

BAD = range(56, 64)  # the batch of step 8
LEFT_OUT = [48, 64]  # and the one before it
ENGINES = {
    "fsdp": [],
    "zero1": ["engine=deepspeed", "engine.zero_stage=1"],
    "zero3": ["engine=deepspeed", "engine.zero_stage=3", "engine.persist_below=0"],
}


batch = PackedTrain.batch


def spoiled(bad: range):
    """The rows at some positions are all one token that is nowhere else."""

    def rows(self: PackedTrain, position: int, *others: int) -> torch.Tensor:
        found = batch(self, position, *others)
        return torch.full_like(found, 1) if position in bad else found

    return rows


def without(self: PackedTrain, position: int, *others: int) -> torch.Tensor:
    """The data has no rows at the positions that are left out."""
    first, end = LEFT_OUT
    return batch(self, position if position < first else position + end - first, *others)


def on_data(bad: range, spiked: list[list[str]], never: list[list[str]]) -> None:
    """Train on data with bad rows, and on data that lacks these."""
    for rows, jobs in ((spoiled(bad), spiked), (without, never)):
        PackedTrain.batch = rows
        for job in jobs:
            train(job)


@pytest.fixture
def base(tiny: list[str]) -> list[str]:
    return [
        *[override for override in tiny if not override.startswith("checkpoint.every")],
        "param.execution=factored",
        "schedule=constant",
        "schedule.warmup=0.0",
        "spectra=off",
        "checkpoint.every=3",
        "checkpoint.keep=4",
        "rollback.spike=2",
        "rollback.window=5",
        "rollback.skip=2",
    ]


def test_a_run_that_left_out_a_spike_is_one_that_never_saw_those_batches(tmp_path: Path, base: list[str]):
    """Under each engine; also when it stops and goes on after the rollback: what is left out is in the checkpoint."""
    spiked = [[*base, *ENGINES[engine], f"run.dir={tmp_path}/{engine}", "train.steps=11"] for engine in ENGINES]
    halves = [[*base, f"run.dir={tmp_path}/halves", "resume=auto", f"train.steps={steps}"] for steps in (9, 11)]
    never = [[*base, *ENGINES[engine], f"run.dir={tmp_path}/never-{engine}", "train.steps=11"] for engine in ENGINES]
    together(on_data, (BAD, [*spiked, *halves], never), tmp_path)
    said = (tmp_path / "0.txt").read_text()
    assert said.count("going back to") == len(ENGINES) + 1
    assert f"going back to {tmp_path}/fsdp/checkpoints/step-00000006 and on without the sequences 48 … 63" in said
    for run, engine in (*((engine, engine) for engine in ENGINES), ("halves", "fsdp")):
        expected = losses(tmp_path / f"never-{engine}")
        assert len(expected) == 11 and losses(tmp_path / run) == expected, run
        progress = read_meta(whole_checkpoints(tmp_path / run / "checkpoints")[-1]).progress
        assert progress.left_out == [LEFT_OUT] and progress.position == 11 * 8 + 16
        assert series(tmp_path / run / "metrics.jsonl", "train/rollbacks")[1].tolist() == [1]


def test_rollbacks_are_bounded_and_without_a_checkpoint_there_is_none(tmp_path: Path, base: list[str]):
    job = [*base, "train.steps=12", "train.micro_batch_size=8", "rollback.most=2"]
    (alone,) = crew(on_data, (range(56, 10**6), [[*job, f"run.dir={tmp_path}/bounded"]], []), tmp_path, 1)
    alone.join(300)
    said = (tmp_path / "0.txt").read_text()
    assert alone.exitcode == 1 and said.count("going back to") == 2
    assert (
        "Diverged: step 7: the loss" in said and "after rollback.most=2 rollbacks; the last good checkpoint is" in said
    )

    job += ["checkpoint.every=0", "train.steps=10", f"run.dir={tmp_path}/no"]
    together(on_data, (BAD, [job], []), tmp_path, 1)
    assert "there is no checkpoint from before it to go back to" in (tmp_path / "0.txt").read_text()
    assert all(map(math.isfinite, losses(tmp_path / "no").values()))
