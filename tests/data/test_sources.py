import bz2
import errno
import gzip
import json
import lzma
import os
import re
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import c4_config, compose_data, local_config, write_jsonl
from omegaconf.errors import OmegaConfBaseException

from lrtrain.core.cache import content_digests
from lrtrain.data.faults import Faults
from lrtrain.data.files import read_documents
from lrtrain.data.prepare import check_data, prepare_data
from lrtrain.data.sources import LocalFiles, PythonStdlib, json_batches
from lrtrain.errors import ConfigError, RunFailed

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
    assert list(LocalFiles(str(tmp_path), "text").documents(Faults(refuse=True))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_a_text_file_is_a_document(tmp_path, name):
    text = TEXTS[0].encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert list(LocalFiles(str(tmp_path), "text").documents(Faults(refuse=True))) == [TEXTS[0]]


def test_a_row_of_parquet_is_a_document(tmp_path):
    pq.write_table(pa.table({"content": TEXTS, "n": [1, 2]}), tmp_path / "a.parquet")
    assert list(LocalFiles(str(tmp_path), "content").documents(Faults(refuse=True))) == TEXTS


def test_files_come_sorted_and_once_whatever_names_them(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "ignored.bin"):
        (tmp_path / name).write_text(name)
    patterns = [str(tmp_path / "b.txt"), str(tmp_path), str(tmp_path / "**/*.txt")]
    assert list(LocalFiles(patterns, "text").documents(Faults(refuse=True))) == ["a.txt", "b.txt", "sub/c.txt"]


def corrupt(folder: Path) -> list[str]:
    """A corpus where nine things cannot be read; what each is said to be, in order."""
    lines = ['{"text": "good"}', "{broken", '{"other": 1}', '{"text": 5}', "[]", '{"text": "\\ud800"}', '{"text": " "}']
    (folder / "a.jsonl").write_text("\n".join(lines) + '\n\n{"text": "last"}\n')
    (folder / "b.txt").write_bytes(b"\xff\xfe not UTF-8")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"cut short" * 1000)[:-20])
    (folder / "d.txt").write_text("after all")
    pq.write_table(pa.table({"text": ["one", "two"] * 5000}), folder / "e.parquet", row_group_size=2048)
    whole = (folder / "e.parquet").read_bytes()
    (folder / "f.parquet").write_bytes(whole[:-8])
    pages = bytearray(whole)
    second = pq.ParquetFile(folder / "e.parquet").metadata.row_group(1).column(0)
    start = second.dictionary_page_offset
    pages[start : start + second.total_compressed_size] = b"\xff" * second.total_compressed_size
    (folder / "e.parquet").write_bytes(pages)
    rows = [f"a.jsonl:{row}" for row in (2, 3, 4, 5, 6)]
    whole_file = [f"{name}, the whole file" for name in ("b.txt", "c.txt.gz", "f.parquet")]
    places = [*rows, *whole_file[:2], "e.parquet:2049", whole_file[2]]
    return [f"{folder}/{place}: " for place in places]


def test_what_cannot_be_read_is_left_out_counted_and_named_by_file_and_row(tmp_path, caplog):
    places = corrupt(tmp_path)
    faults = Faults(refuse=False)
    found = list(LocalFiles(str(tmp_path), "text").documents(faults))
    assert found == ["good", "last", "after all", *["one", "two"] * 1024]
    assert (faults.rows, faults.files) == (6, 3) and faults.first.startswith(places[0])
    said = [record.getMessage() for record in caplog.records]
    assert [message.startswith(f"left out: {place}") for message, place in zip(said, places, strict=True)] == [True] * 9


def test_what_cannot_be_read_is_refused_where_that_is_asked_for_also_by_rows_packed_before(local, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    config = local(f"data.path={corpus}")
    corpus.write_text(corpus.read_text() + "{broken\n")
    refusal = f"data.on_error=refuse: {corpus}:301: no text in field 'text'; repair or remove it"
    with pytest.raises(ConfigError, match=refusal):
        prepare_data(local("data.on_error=refuse"), seed=0)
    data = prepare_data(config, seed=0)
    assert (data.faults.count, data.faults.first) == (1, f"{corpus}:301: no text in field 'text'")
    with pytest.raises(ConfigError, match=refusal):
        prepare_data(local("data.on_error=refuse"), seed=0)


def test_a_stream_leaves_out_rows_and_the_rest_of_a_damaged_file_and_resumes_exactly(tmp_path, caplog):
    config = c4_config(tmp_path)
    first, second = (tmp_path / f"c4-train.{i:05}-of-00007.json.gz" for i in (0, 4))  # both of stream 0
    lines = gzip.decompress(first.read_bytes()).splitlines(keepends=True)
    first.write_bytes(gzip.compress(b"".join([*lines[:3], b'{"text": "\xff"}\n', *lines[3:]])))
    many = gzip.compress(b"".join(json.dumps({"text": f"{i} {i * i}"}).encode() + b"\n" for i in range(5000)))
    second.write_bytes(many[:-1000])
    whole = prepare_data(config, seed=0).train
    batches = [whole.batch(position, 40, 0, 1) for position in range(0, 1600, 40)]
    assert whole.faults.first == f"{first}:4: no text in field 'text'"
    assert f"{second}, the whole file: " in caplog.text and "end-of-stream" in caplog.text

    resumed = prepare_data(config, seed=0).train
    for position in range(0, 1600, 40):
        assert torch.equal(resumed.batch(position, 40, 0, 1), batches[position // 40])
        again = prepare_data(config, seed=0).train
        again.load_state(json.loads(json.dumps(resumed.state(position + 40))))
        resumed = again
    with pytest.raises(ConfigError, match=f"data.on_error=refuse: {first}:4: "):
        prepare_data(c4_config(tmp_path, "data.on_error=refuse"), seed=0).train.batch(0, 40, 0, 1)


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
    monkeypatch.setattr("lrtrain.core.cache._digest", lambda path: pytest.fail(f"{path} was read"))
    assert content_digests([path], tmp_path) == digests


def test_a_path_that_the_default_text_does_not_read_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="data.path=/x has no effect on data=pystdlib; add data=local"):
        check_data(compose_data("pystdlib", tmp_path, "data.path=/x"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=null", "data.path=None matches no file"),
        ("data.path=[]", r"data.path=\[\] names no file"),
        ("data.path=/nope", "data.path=/nope matches no file; give files, folders or globs of .txt"),
        ("data.text_field=content", r"data.text_field=content is not a field of .*; give one of \['text'\]"),
        ("data.on_error=ignore", "data.on_error=ignore must be 'skip' or 'refuse'"),
        ("data.seq_len=0", "data.seq_len=0 must be greater than 0"),
        ("data.validation_fraction=1.5", "data.validation_fraction=1.5 must be at least 0 and below 1"),
        ("data.cache_dir=/dev/null/x", "data.cache_dir=/dev/null/x cannot be made"),
        ("data.source._target_=lrtrain.data.sources.Nothing", "data.source=.* cannot be made"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_built(local, override, message):
    with pytest.raises(ConfigError, match=message):
        check_data(local(override))


def test_a_local_corpus_has_no_default_path(tmp_path):
    with pytest.raises(OmegaConfBaseException, match="path"):
        compose_data("local", tmp_path)


def test_a_right_configuration_passes(local, c4):
    check_data(local())
    check_data(c4())


def documents(folder: Path, faults: Faults | None = None) -> list[str]:
    return list(LocalFiles(str(folder), "text").documents(faults or Faults(refuse=True)))


def test_linked_folders_are_followed_once_and_circles_end(tmp_path):
    for name in ("corpus", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "corpus" / "linked").symlink_to("../elsewhere")
    (tmp_path / "corpus" / "twice").symlink_to("../elsewhere")
    (tmp_path / "corpus" / "circle").symlink_to(".")
    (tmp_path / "corpus" / "b.txt").symlink_to("a.txt")
    assert documents(tmp_path / "corpus") == ["corpus", "elsewhere"]


def test_hidden_files_and_folders_are_left_out_and_counted_unless_they_are_named(tmp_path, caplog):
    (tmp_path / ".git").mkdir()
    for name in ("a.txt", ".b.txt", ".git/c.txt"):
        (tmp_path / name).write_text(name)
    source = LocalFiles(str(tmp_path), "text")
    source.check()
    assert list(source.documents(Faults(refuse=True))) == ["a.txt"]
    assert caplog.text.count("2 hidden files and folders are left out") == 1
    assert documents(tmp_path / ".git") == [".git/c.txt"] and documents(tmp_path / ".b.txt") == [".b.txt"]


def lost_files(folder: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(200)]
    write_jsonl(folder / "good.jsonl", ["good"])
    (folder / "array.json").write_text(json.dumps(rows, indent=1))
    (folder / "empty.txt").touch()
    pq.write_table(pa.table({"body": ["x"] * 50}), folder / "other.parquet")
    pq.write_table(pa.table({"text": [b"x"] * 50}), folder / "binary.parquet")


def test_a_file_without_a_document_counts_as_a_file(tmp_path, caplog):
    lost_files(tmp_path)
    faults = Faults(refuse=False)
    assert documents(tmp_path, faults) == ["good"]
    assert (faults.rows, faults.files) == (0, 4)
    for name, reason in [
        ("array.json", "it is an array; give one JSON object a line"),
        ("binary.parquet", "its column 'text' is of type binary, not of texts"),
        ("empty.txt", "it holds no text"),
        ("other.parquet", "it has no column 'text'"),
    ]:
        assert f"left out: {tmp_path}/{name}, the whole file: {reason}" in caplog.text
    assert str(faults).startswith(f"4 whole files are left out, the first: {tmp_path}/array.json, the whole file: ")


@pytest.mark.parametrize("name", ["array.json", "empty.txt", "other.parquet", "binary.parquet"])
def test_a_file_without_a_document_is_refused_by_name_where_that_is_asked_for(tmp_path, name):
    lost_files(tmp_path)
    with pytest.raises(ConfigError, match=f"data.on_error=refuse: {tmp_path}/{name}"):
        documents(tmp_path / name)


@pytest.mark.parametrize(
    "column",
    [pa.array([b"x"]), pa.array([{"a": "x"}]), pa.array([["x"]]), pa.array([1])],
    ids=["binary", "struct", "list", "int64"],
)
def test_a_parquet_column_that_is_not_of_texts_is_named_with_its_type(local, tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    kind = str(column.type).split("<")[0]
    said = f"data.text_field=text does not suit {tmp_path}/a.parquet: its column 'text' is of type {kind}"
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_data(local(f"data.path={tmp_path}/a.parquet"))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    column = pa.array(["x"]).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert documents(tmp_path) == ["x"]


@pytest.mark.parametrize("text", ["", " \n\t ", '{"text": " "}\n'])
def test_a_corpus_of_white_space_is_named(local, tmp_path, text):
    name = "a.jsonl" if text.startswith("{") else "a.txt"
    (tmp_path / name).write_text(text)
    said = f"data.path has no text; 1 whole file is left out, the first: {tmp_path}/{name}"
    with pytest.raises(ConfigError, match=said):
        prepare_data(local(f"data.path={tmp_path}/{name}"), seed=0)


def test_deep_nesting_is_an_unreadable_row_and_not_the_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + "[" * 200_000 + '\n{"text": "two"}\n')
    faults = Faults(refuse=False)
    assert documents(tmp_path, faults) == ["one", "two"] and faults.rows == 1
    assert list(json_batches(str(tmp_path / "a.jsonl"), "text", 0, faults)) == [[(0, "one"), (2, "two")]]


def test_names_that_are_no_utf8_are_read_and_told_in_ascii(tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    pq.write_table(pa.table({"text": ["p"]}), tmp_path / "p.parquet")
    os.rename(tmp_path / "p.parquet", odd + "p.parquet")
    Path(odd + "j.jsonl").write_text('{"text": "j"}\n{broken\n')
    Path(odd + "z.txt.zst").write_bytes(zstd(b"z"))
    faults = Faults(refuse=False)
    assert documents(tmp_path, faults) == ["j", "p", "z"]
    assert "\\udcffj.jsonl:2" in faults.first and faults.first.isascii()
    assert LocalFiles(str(tmp_path), "text").fingerprint(tmp_path / "cache")


class FailingReads:
    """`Path.open` of files that fail so many times once they were read from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, failures: int, code: int):
        self.path, self.failures, self.code, self.open = path, failures, code, open
        monkeypatch.setattr("lrtrain.data.files.open", self, raising=False)
        monkeypatch.setattr("lrtrain.core.retry.PAUSES", (0.0, 0.0))

    def __call__(self, path, mode="r"):
        file = self.open(path, mode)
        return self.lines(file) if path == self.path and self.failures else file

    @contextmanager
    def lines(self, file):
        def two_and_no_more():
            yield file.readline()
            yield file.readline()
            self.failures -= 1
            raise OSError(self.code, os.strerror(self.code))

        yield two_and_no_more()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_passing_fault_of_the_disk_loses_nothing_of_a_packed_corpus(tmp_path, monkeypatch, code):
    whole = prepare_data(local_config(tmp_path, f"data.cache_dir={tmp_path}/first"), seed=0)
    FailingReads(monkeypatch, tmp_path / "corpus.jsonl", 2, code)
    again = prepare_data(local_config(tmp_path, f"data.cache_dir={tmp_path}/second"), seed=0)
    assert again.fingerprint == whole.fingerprint and again.faults.count == 0
    assert torch.equal(again.train.batch(0, 60, 0, 1), whole.train.batch(0, 60, 0, 1))


def test_a_lasting_fault_of_the_disk_ends_with_the_name_and_leaves_no_cache(tmp_path, monkeypatch):
    config = local_config(tmp_path)
    FailingReads(monkeypatch, tmp_path / "corpus.jsonl", 100, errno.EIO)
    with pytest.raises(RunFailed, match=f"{tmp_path}/corpus.jsonl cannot be read"):
        prepare_data(config, seed=0)
    left = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert all(".building-" in name for name in left)


def test_a_file_that_is_removed_before_it_is_read_ends_a_packed_corpus_and_is_left_out_of_a_stream(tmp_path):
    gone = tmp_path / "gone.jsonl"
    with pytest.raises(RunFailed, match=f"{gone} was removed"):
        list(read_documents([gone], "text", Faults(refuse=False)))
    faults = Faults(refuse=False)
    assert list(json_batches(str(gone), "text", 0, faults)) == [] and faults.files == 1
