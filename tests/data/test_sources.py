import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import compose_data, write_jsonl
from omegaconf.errors import OmegaConfBaseException

from lrtrain.data import check
from lrtrain.data.cache import content_digests
from lrtrain.data.sources import LocalFiles, PythonStdlib
from lrtrain.errors import ConfigError

TEXTS = ["first\r\n\ttext ", "zwei ▁ Straße\n"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("compression", "compress"),
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)],
)
def test_a_row_of_json_is_a_document(tmp_path, suffix, compression, compress):
    (tmp_path / f"c4.00000-of-1{suffix}{compression}").write_bytes(compress(LINES))
    assert list(LocalFiles(str(tmp_path), "text").documents()) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_a_text_file_is_a_document(tmp_path, name):
    text = TEXTS[0].encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert list(LocalFiles(str(tmp_path), "text").documents()) == [TEXTS[0]]


def test_a_row_of_parquet_is_a_document(tmp_path):
    pq.write_table(pa.table({"content": TEXTS, "n": [1, 2]}), tmp_path / "a.parquet")
    assert list(LocalFiles(str(tmp_path), "content").documents()) == TEXTS


def test_files_come_sorted_and_once_whatever_names_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "ignored.bin"):
        (tmp_path / name).write_text(name)
    patterns = [str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "**/*.txt")]
    assert list(LocalFiles(patterns, "text").documents()) == ["a.txt", "b.txt", "sub/c.txt"]


def test_bad_documents_are_skipped_counted_and_the_first_is_named(tmp_path, caplog):
    lines = ['{"text": "good"}', "{broken", '{"other": 1}', '{"text": 5}', "[]", '{"text": "\\ud800"}', '{"text": " "}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + '\n\n{"text": "last"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe not UTF-8")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"cut short" * 1000)[:-20])
    (tmp_path / "d.txt").write_text("after all")
    assert list(LocalFiles(str(tmp_path), "text").documents()) == ["good", "last", "after all"]
    assert "skipped 7 unreadable documents, the first: " in caplog.text
    assert f"{tmp_path / 'a.jsonl'}:2: " in caplog.text


def test_the_standard_library_has_no_installed_packages():
    source = PythonStdlib()
    source.check()
    names = [path.relative_to(source.root()) for path in source.files()]
    assert Path("argparse.py") in names
    assert not any(part.endswith("-packages") for name in names for part in name.parts)


def test_the_fingerprint_is_of_the_content(tmp_path):
    (tmp_path / "one").mkdir()
    path = write_jsonl(tmp_path / "one" / "a.jsonl", ["some text"])
    before = LocalFiles(str(path), "text").fingerprint(tmp_path)
    os.utime(path, ns=(1, 1))
    (tmp_path / "one").rename(tmp_path / "two")
    moved = tmp_path / "two" / "a.jsonl"
    assert LocalFiles(str(moved), "text").fingerprint(tmp_path) == before
    write_jsonl(moved, ["same size"])
    assert LocalFiles(str(moved), "text").fingerprint(tmp_path) != before


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["text"])
    digests = content_digests([path], tmp_path)
    monkeypatch.setattr("lrtrain.data.cache._digest", lambda path: pytest.fail(f"{path} was read"))
    assert content_digests([path], tmp_path) == digests


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=null", "data.path=None matches no file"),
        ("data.path=[]", r"data.path=\[\] names no file"),
        ("data.path=/nope", "data.path=/nope matches no file; give files, folders or globs of .txt"),
        ("data.text_field=content", r"data.text_field=content is not a field of .*; give one of \['text'\]"),
        ("data.seq_len=0", "data.seq_len=0 must be at least 1"),
        ("data.validation_fraction=1.5", r"data.validation_fraction=1.5 must be in \[0, 1\)"),
        ("data.cache_dir=/dev/null/x", "data.cache_dir=/dev/null/x cannot be made"),
        ("data.source._target_=lrtrain.data.sources.Nothing", "data.source=.* cannot be made"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(local, override, message):
    with pytest.raises(ConfigError, match=message):
        check(local(override))


def test_a_local_corpus_has_no_default_path(tmp_path):
    with pytest.raises(OmegaConfBaseException, match="path"):
        compose_data("local", tmp_path)


def test_a_right_configuration_passes(local, c4):
    check(local())
    check(c4())
