"""A checkpoint is whole or it is not there."""

import json
from pathlib import Path

import pytest
import torch

from lrtrain import distributed
from lrtrain.checkpoint import MARKER, Checkpointer, find_checkpoint, read_meta, remove, whole_checkpoints
from lrtrain.errors import ConfigError


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


def make(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    if whole:
        (path / MARKER).write_text(json.dumps({"step": step}))
    return path


def test_only_whole_checkpoints_are_seen(tmp_path: Path):
    make(tmp_path, 10)
    make(tmp_path, 5)
    make(tmp_path, 20, whole=False)
    make(tmp_path, 30).rename(tmp_path / ".step-00000030.partial")
    make(tmp_path, 40).rename(tmp_path / "step-00000040.backup")
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


def test_a_run_or_a_checkpoint_can_be_named(tmp_path: Path):
    made = make(tmp_path / "checkpoints", 10)
    assert find_checkpoint(tmp_path) == find_checkpoint(made) == made
    with pytest.raises(ConfigError, match=f"resume={tmp_path}/nothing holds no complete checkpoint"):
        find_checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saving_and_loading_gives_the_state_back(tmp_path: Path, world, asynchronous: bool):
    saver = Checkpointer(tmp_path, world, keep=2, keep_every=None, asynchronous=asynchronous)
    state = {"model": {"w": torch.randn(5, 3)}, "optimizer": {"state.w.step": torch.tensor(3.0)}}
    before = state["model"]["w"].clone()
    saver.save(state, 3, {"tokens": 7})
    state["model"]["w"].zero_()  # training goes on while it is written
    saver.wait()
    (found,) = whole_checkpoints(tmp_path)
    saver.load(state, found)
    assert torch.equal(state["model"]["w"], before)
    assert read_meta(found) == {"tokens": 7, "step": 3}


def test_the_newest_are_kept_and_the_unfinished_neither_count_nor_stay(tmp_path: Path, world):
    make(tmp_path, 1, whole=False)
    make(tmp_path, 2).rename(tmp_path / ".step-00000002.partial")
    saver = Checkpointer(tmp_path, world, keep=2, keep_every=4, asynchronous=True)
    for step in range(3, 9):
        saver.save({"w": torch.zeros(1)}, step, {})
    saver.wait()
    assert [int(p.name[5:]) for p in whole_checkpoints(tmp_path)] == [4, 7, 8]
    assert not list(tmp_path.glob(".*"))


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch):
    made = make(tmp_path, 10)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("lrtrain.checkpoint.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(made)
    assert whole_checkpoints(tmp_path) == []
