"""A folder that is built once is whole or not there; what became of it later is noticed."""

import logging
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest

from lrtrain.core import cache
from lrtrain.core.cache import build_once, cache_folder, content_digests
from lrtrain.core.seal import SEAL, damage, seal
from lrtrain.errors import ConfigError, RunFailed

FORK = multiprocessing.get_context("fork")
NOBODY = 65534


def build_whole(folder: Path) -> None:
    (folder / "whole").write_text("all of it")


def build_half_and_hang(folder: Path) -> None:
    (folder / "half").touch()
    time.sleep(60)


def build_half_and_fail(folder: Path) -> None:
    (folder / "half").touch()
    raise RuntimeError("no space")


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_killed_build_is_not_taken_for_whole(tmp_path):
    target = tmp_path / "x"
    process = FORK.Process(target=build_once, args=(target, build_half_and_hang))
    process.start()
    while not list(tmp_path.glob("x.building-*/half")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not target.exists()

    build_once(target, build_whole)
    assert names(target) == [SEAL, "whole"]
    assert names(tmp_path) == ["x", "x.lock"]


def test_a_build_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError):
        build_once(tmp_path / "x", build_half_and_fail)
    assert not (tmp_path / "x").exists()
    build_once(tmp_path / "x", build_whole)
    assert names(tmp_path / "x") == [SEAL, "whole"]


@pytest.mark.parametrize("text", ["all of iT", "all of", "", None])
@pytest.mark.parametrize("name", ["whole", SEAL])
def test_what_is_damaged_is_built_anew_with_a_word(tmp_path, caplog, name, text):
    """A flipped bit, a cut, a file of 0 bytes as a power cut leaves it, a file that is gone."""
    file = build_once(tmp_path / "x", build_whole) / name
    file.unlink() if text is None else file.write_text(text)
    build_once(tmp_path / "x", build_whole)
    assert (tmp_path / "x" / "whole").read_text() == "all of it" and damage(tmp_path / "x") is None
    assert f"{tmp_path}/x" in caplog.text and "it is rebuilt" in caplog.text
    caplog.clear()
    build_once(tmp_path / "x", build_half_and_fail)
    assert not caplog.text


def test_of_a_large_file_a_sample_is_read_unless_it_was_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr("lrtrain.core.seal.BLOCK", 4)
    monkeypatch.setattr("lrtrain.core.seal.WHOLE", 100)
    monkeypatch.setattr("lrtrain.core.seal.SAMPLE", 200)
    file = tmp_path / "large"
    file.write_bytes(bytes(range(256)) * 4)
    seal(tmp_path)
    assert damage(tmp_path) is None
    before = file.stat()
    file.write_bytes(bytes(256) * 4)
    assert damage(tmp_path) == f"{file} does not have its checksum"
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert damage(tmp_path) == f"{file} does not have its checksum"
    monkeypatch.setattr("lrtrain.core.seal.SAMPLE", 0)
    assert damage(tmp_path) is None


def test_everything_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (synced.append("rename"), rename(self, to)))
    build_once(tmp_path / "x", build_whole)
    building = synced[synced.index("rename") - 1]
    assert building.startswith("x.building-") and synced[-2:] == ["rename", tmp_path.name]
    assert {"whole", SEAL} <= set(synced[: synced.index("rename")])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"crc32": 1, "known": {"a": "b"}}', '{"/old:1:1": "0123"}'])
def test_damaged_digests_of_files_are_taken_anew(tmp_path, caplog, content):
    (tmp_path / "a.txt").write_text("text")
    right = content_digests([tmp_path / "a.txt"], tmp_path / "cache")
    (tmp_path / "cache" / "file-digests.json").write_text(content)
    assert content_digests([tmp_path / "a.txt"], tmp_path / "cache") == right
    assert "file-digests.json is damaged" in caplog.text


def test_a_flipped_digest_is_noticed(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (right,) = content_digests([tmp_path / "a.txt"], tmp_path / "cache")
    memo = tmp_path / "cache" / "file-digests.json"
    memo.write_text(memo.read_text().replace(right, right[::-1]))
    assert content_digests([tmp_path / "a.txt"], tmp_path / "cache") == [right]


def as_user(uid: int, call, *arguments) -> int:
    """The exit code of a process of user `uid` with umask 022 that makes the call."""

    def run() -> None:
        os.umask(0o022)
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
        call(*arguments)

    process = FORK.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def use(shared: Path, corpus: Path, name: str) -> None:
    content_digests([corpus], shared)
    build_once(shared / "common", build_whole)
    build_once(shared / name, build_whole)
    cache.make_shared(shared / "init")
    (shared / "init" / name).touch()


@pytest.fixture
def open_folder():
    """A folder below which any user can find a way."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_two_users_share_a_cache(open_folder, mode):
    shared, corpora = open_folder / "cache", [open_folder / "a.txt", open_folder / "b.txt"]
    for corpus in corpora:
        corpus.write_text(corpus.name)
    shared.mkdir()
    shared.chmod(mode)
    assert as_user(1, use, shared, corpora[0], "of-1") == 0
    assert as_user(NOBODY, use, shared, corpora[1], "of-nobody") == 0
    assert as_user(1, use, shared, corpora[1], "of-1") == 0
    assert (shared / "common").stat().st_uid == 1 and (shared / "of-nobody").stat().st_uid == NOBODY


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_what_another_user_left_damaged_is_replaced_or_named(open_folder, mode):
    shared = open_folder / "cache"
    shared.mkdir()
    shared.chmod(mode)
    assert as_user(1, build_once, shared / "x", build_whole) == 0
    (shared / "x" / "whole").write_text("")

    def rebuild() -> None:
        if mode == 0o777:
            build_once(shared / "x", build_whole)
        else:
            with pytest.raises(RunFailed, match=f"{shared}/x is damaged and cannot be replaced .* remove it"):
                build_once(shared / "x", build_whole)

    assert as_user(NOBODY, rebuild) == 0


def test_the_cache_is_below_home_or_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.delenv("LRTRAIN_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lrtrain"
    monkeypatch.setenv("LRTRAIN_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_without_a_home_to_write_to_the_cache_is_temporary_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("LRTRAIN_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    caplog.set_level(logging.WARNING)
    folder = tmp_path / f"lrtrain-{os.getuid()}"
    assert cache_folder() == cache_folder() == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count(f"the cache is {folder}; LRTRAIN_CACHE names another") == 1


def test_a_named_cache_that_cannot_be_written_to_is_refused(monkeypatch):
    monkeypatch.setenv("LRTRAIN_CACHE", "/dev/null/x")
    with pytest.raises(ConfigError, match="LRTRAIN_CACHE=/dev/null/x cannot be made"):
        cache_folder()
