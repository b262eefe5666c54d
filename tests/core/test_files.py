"""What is under its final name was on the disk before it got it."""

import os
from pathlib import Path

import pytest

from lrtrain.core.files import write_durably, write_folder_durably


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


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_durably(tmp_path / "run.json", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_durably(tmp_path / "run.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "old"}
