"""A checkpoint is whole or it is not there."""

import json
import os
import pickle
import resource
import signal
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from crew import together
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from lrtrain import distributed
from lrtrain.checkpoint.checkpointer import (
    MARKER,
    META,
    Checkpointer,
    checksums,
    damage_of,
    find_checkpoint,
    newest_sound,
    remove,
    whole_checkpoints,
)
from lrtrain.checkpoint.meta import CheckpointMeta, DataState, Progress, read_meta
from lrtrain.distributed.world import World
from lrtrain.errors import ConfigError


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(step, Progress(step), DataState("", None), {}, "", "", {}, 1)


def make(folder: Path, step: int, whole: bool = True) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    if whole:
        (path / META).write_text("{}")
        (path / MARKER).write_text(json.dumps(checksums([path / META])))
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
    saver.save(state, 3, meta(3))
    state["model"]["w"].zero_()  # training goes on while it is written
    saver.wait()
    (found,) = whole_checkpoints(tmp_path)
    saver.load(state, found)
    assert torch.equal(state["model"]["w"], before)
    assert read_meta(found) == meta(3)


def test_a_stager_that_keeps_its_memory_saves_the_values_of_each_step(tmp_path: Path, world):
    saver = Checkpointer(tmp_path, world, keep=2, keep_every=None, asynchronous=True)
    saver.stager = DefaultStager(StagingOptions(False, False, False, False))  # as on a GPU, but for pinning
    state = {"model": {"w": torch.zeros(5, 3)}, "optimizer": {"state.w.step": torch.tensor(0.0)}}
    for step in (1, 2):
        state["model"]["w"].fill_(step)
        saver.save(state, step, meta(step))
        state["model"]["w"].zero_()
    saver.wait()
    for step, checkpoint in enumerate(whole_checkpoints(tmp_path), 1):
        saver.load(state, checkpoint)
        assert (state["model"]["w"] == step).all()


def test_what_is_said_of_a_checkpoint_is_of_the_step_that_was_saved(tmp_path: Path, world, monkeypatch):
    """Tensors may be written for longer than the next step takes, which changes the run's progress."""
    saver, told, written = Checkpointer(tmp_path, world, keep=2, keep_every=None, asynchronous=True), meta(3), Future()
    real = dcp.async_save
    monkeypatch.setattr(dcp, "async_save", lambda *args, **kwargs: real(*args, **kwargs).result() and None or written)
    saver.save({"w": torch.zeros(2)}, 3, told)
    told.progress.step = 4
    written.set_result(None)
    saver.wait()
    assert read_meta(tmp_path / "step-00000003").progress.step == 3


def test_the_newest_are_kept_and_the_unfinished_neither_count_nor_stay(tmp_path: Path, world):
    make(tmp_path, 1, whole=False)
    make(tmp_path, 2).rename(tmp_path / ".step-00000002.partial")
    (tmp_path / ".of-others").touch()
    saver = Checkpointer(tmp_path, world, keep=2, keep_every=4, asynchronous=True)
    for step in range(3, 9):
        saver.save({"w": torch.zeros(1)}, step, meta(step))
    saver.wait()
    assert [int(p.name[5:]) for p in whole_checkpoints(tmp_path)] == [4, 7, 8]
    assert [p.name for p in tmp_path.glob(".*")] == [".of-others"]


def test_a_removal_that_is_interrupted_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch):
    made = make(tmp_path, 10)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("lrtrain.checkpoint.checkpointer.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove(made)
    assert whole_checkpoints(tmp_path) == []


def saved(folder: Path, world: World, *steps: int) -> Checkpointer:
    saver = Checkpointer(folder, world, keep=9, keep_every=None, asynchronous=False)
    for step in steps:
        saver.save({"w": torch.full((1000,), float(step))}, step, meta(step))
    return saver


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "meta.json", "checksums.json"])
@pytest.mark.parametrize("spoil", [flip_a_bit, cut_off, Path.unlink])
def test_a_checkpoint_that_was_changed_is_left_aside_for_the_one_before(tmp_path: Path, world, capsys, file, spoil):
    saved(tmp_path, world, 1, 2)
    first, second = whole_checkpoints(tmp_path)
    assert newest_sound(tmp_path) == second and damage_of(first) is None
    spoil(second / file)
    assert newest_sound(tmp_path) == first
    named = file if file != MARKER else ""  # of a marker that is wrong itself any file may seem to be
    assert f"{second} is damaged and left aside: {named}" in capsys.readouterr().err
    with pytest.raises(
        ConfigError, match=f"resume={second} is damaged: {named}" if (second / MARKER).exists() else str(second)
    ):
        find_checkpoint(second)
    spoil(first / "__0_0.distcp")
    with pytest.raises(ConfigError, match="all checkpoints in .* are damaged"):
        newest_sound(tmp_path)


@pytest.mark.parametrize("written", ["5", "[]", "{}", "null", "[" * 200_000, ""])
def test_a_marker_that_is_none_is_damage(tmp_path: Path, world, written: str):
    saved(tmp_path, world, 1, 2)
    first, second = whole_checkpoints(tmp_path)
    (second / MARKER).write_text(written)
    assert newest_sound(tmp_path) == first


def steps(folder: Path) -> list[int]:
    return [int(checkpoint.name[5:]) for checkpoint in whole_checkpoints(folder)]


def test_a_sound_checkpoint_is_never_removed_for_a_damaged_one(tmp_path: Path, world):
    """Resumed from 30, since 40 is damaged, with keep=1: what is saved at 34 stays, though 40 has the higher step."""
    saved(tmp_path, world, 30, 40)
    flip_a_bit(tmp_path / "step-00000040" / "__0_0.distcp")
    saver = Checkpointer(tmp_path, world, keep=1, keep_every=None, asynchronous=False)
    state = {"w": torch.zeros(1000)}
    resumed = newest_sound(tmp_path)
    assert resumed is not None
    saver.load(state, resumed)
    saver.save(state, 34, meta(34))
    assert steps(tmp_path) == [34, 40] and newest_sound(tmp_path) == tmp_path / "step-00000034"
    saver.save(state, 40, meta(40))
    assert steps(tmp_path) == [40] and damage_of(tmp_path / "step-00000040") is None


def test_checkpoints_that_nobody_checked_do_not_count_for_retention(tmp_path: Path, world):
    """Resuming has checked 40, the newest; 30, which may be damaged, is not one of the two to keep."""
    saved(tmp_path, world, 10, 20, 30, 40)
    flip_a_bit(tmp_path / "step-00000030" / "__0_0.distcp")
    saver = Checkpointer(tmp_path, world, keep=2, keep_every=None, asynchronous=True)
    state = {"w": torch.zeros(1000)}
    saver.load(state, tmp_path / "step-00000040")
    assert steps(tmp_path) == [10, 20, 30, 40]
    saver.save(state, 50, meta(50))
    saver.wait()
    assert steps(tmp_path) == [40, 50]


class Harmful:
    """Touches a file when it is unpickled."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def test_what_a_checkpoint_pickles_is_not_run(tmp_path: Path, world):
    saver = saved(tmp_path, world, 1)
    (checkpoint,) = whole_checkpoints(tmp_path)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Harmful(tmp_path / "touched")))
    with pytest.raises(ConfigError, match="system does not belong in a checkpoint"):
        saver.load({"w": torch.zeros(1000)}, checkpoint)
    assert not (tmp_path / "touched").exists()


def test_values_that_are_no_tensors_are_refused(tmp_path: Path, world):
    saver = Checkpointer(tmp_path, world, keep=9, keep_every=None, asynchronous=False)
    saver.save({"w": torch.zeros(3), "harmful": Harmful(tmp_path / "touched")}, 1, meta(1))
    (checkpoint,) = whole_checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="harmful is not a tensor"):
        saver.load({"w": torch.zeros(3), "harmful": 1}, checkpoint)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_on_one_process_costs_one_checkpoint(tmp_path: Path, asynchronous: bool, full: int):
    together(save_on_a_full_disk, (tmp_path, asynchronous, full), tmp_path)
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]
    assert not list(tmp_path.glob(".step*"))
    said = "".join((tmp_path / f"{k}.txt").read_text() for k in range(2))
    assert said.count("the checkpoint of step 2 failed: ") == 1
    assert "a file could not be written whole, as on a full disk" in said and f" GiB are free in {tmp_path}" in said


def save_on_a_full_disk(folder: Path, asynchronous: bool, full: int) -> None:
    world = distributed.start()
    saver = Checkpointer(folder, world, keep=9, keep_every=None, asynchronous=asynchronous)
    state = {name: torch.ones(2**16) for name in "ab"}  # a file of its own for each process
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for step, disk in enumerate((resource.RLIM_INFINITY, 2**16, resource.RLIM_INFINITY), start=1):
        if world.dist_rank == full:  # no file of this process may grow beyond
            resource.setrlimit(resource.RLIMIT_FSIZE, (disk, resource.RLIM_INFINITY))
        saver.save(state, step, meta(step))
        saver.wait()
        assert saver.saved == (step != 2)
    distributed.stop()
