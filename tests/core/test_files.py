"""What is under its final name was on the disk before it got it."""

import json
import os
from pathlib import Path

import pytest

from lrtrain.core.files import make_folder_durably, read_object, write_durably, write_folder_durably
from lrtrain.sweeps.jobs import Outcome, write_outcomes


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(fsync or rename, name) in order."""
    found: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def noted_sync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def noted(move):
        def moved(source, target):
            found.append(("rename", Path(target).name))
            move(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted(replace))
    monkeypatch.setattr(os, "rename", noted(rename))
    return found


def test_a_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path: Path, calls):
    write_durably(tmp_path / "run.json", "{}")
    assert calls == [("fsync", ".run.json.unfinished"), ("rename", "run.json"), ("fsync", tmp_path.name)]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_is_synced_with_its_files_before_it_gets_its_name(tmp_path: Path, calls):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "stale").touch()
    write_folder_durably(tmp_path / "tokenizer", lambda folder: (folder / "a.json").write_text("1"))
    assert calls == [
        ("fsync", "a.json"),
        ("fsync", ".tokenizer.unfinished"),
        ("rename", ".tokenizer.former"),
        ("rename", "tokenizer"),
        ("fsync", tmp_path.name),
    ]
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "tokenizer",
        "tokenizer/a.json",
    ]


def test_the_names_of_new_folders_are_synced_from_the_outermost_on(tmp_path: Path, calls):
    make_folder_durably(tmp_path / "runs" / "a" / "checkpoints")
    assert calls == [("fsync", tmp_path.name), ("fsync", "runs"), ("fsync", "a")]
    make_folder_durably(tmp_path / "runs" / "a")
    assert len(calls) == 3


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000])
def test_a_damaged_object_is_named_and_left_aside(tmp_path: Path, text: str, capsys):
    (tmp_path / "jobs.json").write_text(text)
    assert read_object(tmp_path / "jobs.json") is None
    assert capsys.readouterr().err == f"{tmp_path}/jobs.json is damaged and left aside\n"
    assert read_object(tmp_path / "none.json") is None and not capsys.readouterr().err


def test_how_jobs_ended_is_on_the_disk_before_it_replaces_what_was_known(tmp_path: Path, calls):
    write_outcomes(tmp_path, [Outcome("a", "finished")])
    (tmp_path / "jobs.json").write_text((tmp_path / "jobs.json").read_text().replace("finished", "failed"))
    calls.clear()
    write_outcomes(tmp_path, [Outcome("b", "stopped")])
    assert calls == [("fsync", ".jobs.json.unfinished"), ("rename", "jobs.json"), ("fsync", tmp_path.name)]
    assert '"a": {\n  "status": "failed"' in (tmp_path / "jobs.json").read_text()
    (tmp_path / "jobs.json").write_text("")  # of a power cut before files were synced
    write_outcomes(tmp_path, [Outcome("b", "finished")])
    assert [*json.loads((tmp_path / "jobs.json").read_text())] == ["b"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_durably(tmp_path / "run.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "run.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "old"}
