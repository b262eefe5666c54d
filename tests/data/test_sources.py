import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import c4_config, compose_data, write_jsonl
from omegaconf.errors import OmegaConfBaseException

from lrtrain.core.cache import content_digests
from lrtrain.data.faults import Faults
from lrtrain.data.prepare import check_data, prepare_data
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
    refusal = f"data.on_error=refuse: {corpus}:301: no text in field 'text'; mend or remove it"
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=null", "data.path=None matches no file"),
        ("data.path=[]", r"data.path=\[\] names no file"),
        ("data.path=/nope", "data.path=/nope matches no file; give files, folders or globs of .txt"),
        ("data.text_field=content", r"data.text_field=content is not a field of .*; give one of \['text'\]"),
        ("data.on_error=ignore", "data.on_error=ignore is not one of skip, refuse"),
        ("data.seq_len=0", "data.seq_len=0 must be at least 1"),
        ("data.validation_fraction=1.5", r"data.validation_fraction=1.5 must be in \[0, 1\)"),
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
