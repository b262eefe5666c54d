"""A folder that is built once is whole or not there."""

import multiprocessing
import time
from pathlib import Path

import pytest

from lrtrain.core.cache import build_once


def build_whole(folder: Path) -> None:
    (folder / "whole").touch()


def build_half_and_hang(folder: Path) -> None:
    (folder / "half").touch()
    time.sleep(60)


def build_half_and_fail(folder: Path) -> None:
    (folder / "half").touch()
    raise RuntimeError("no space")


def test_a_killed_build_is_not_taken_for_whole(tmp_path):
    target, half = tmp_path / "x", tmp_path / "x.building" / "half"
    process = multiprocessing.get_context("fork").Process(target=build_once, args=(target, build_half_and_hang))
    process.start()
    while not half.exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert half.exists() and not target.exists()

    build_once(target, build_whole)
    assert [file.name for file in target.iterdir()] == ["whole"]
    assert not half.parent.exists()


def test_a_build_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError):
        build_once(tmp_path / "x", build_half_and_fail)
    assert not (tmp_path / "x").exists()
    build_once(tmp_path / "x", build_whole)
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["whole"]
