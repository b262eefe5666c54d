import multiprocessing
import time
from pathlib import Path

import pytest

from lrtrain.data import prepare
from lrtrain.data.cache import build_once


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def build_whole(folder: Path) -> None:
    (folder / "whole").touch()


def build_half_and_hang(folder: Path) -> None:
    (folder / "half").touch()
    time.sleep(60)


def build_half_and_fail(folder: Path) -> None:
    (folder / "half").touch()
    raise RuntimeError("no space")


def test_a_second_call_builds_nothing(local, tmp_path):
    first = prepare(local(), seed=0)
    built = contents(tmp_path / "cache")
    second = prepare(local(), seed=0)
    assert contents(tmp_path / "cache") == built
    assert second.fingerprint == first.fingerprint


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
