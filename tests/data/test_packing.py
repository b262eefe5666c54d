import numpy as np
import pytest
import torch
from corpora import make_documents

from lrtrain.data.encoding import encode_documents
from lrtrain.data.packing import PackedRows, RowWriter, is_validation, pack_first, pack_split
from lrtrain.data.prepare import prepare_data
from lrtrain.errors import ConfigError


def all_rows(path) -> torch.Tensor:
    rows = PackedRows(path)
    return rows.rows(range(len(rows)))


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 10, 17, 1000])
@pytest.mark.parametrize("write_rows", [1, 1024])
def test_every_token_is_a_target_exactly_once(tmp_path, monkeypatch, tokens, write_rows):
    monkeypatch.setattr("lrtrain.data.packing.WRITE_ROWS", write_rows)
    stream = np.arange(tokens, dtype=np.int32)
    writer = RowWriter(tmp_path / "a.arrow", seq_len=8)
    for part in np.array_split(stream, 7):
        writer.add(part)
    writer.close()
    rows = all_rows(tmp_path / "a.arrow") if writer.rows else torch.empty(0, 9, dtype=torch.int64)
    assert len(PackedRows(tmp_path / "a.arrow")) == writer.rows == max(0, tokens - 1) // 8
    assert rows[:, 1:].flatten().tolist() == stream[1 : 1 + 8 * writer.rows].tolist()
    assert torch.equal(rows[1:, 0], rows[:-1, -1])


def test_rows_are_the_documents_in_order_with_eos_between(tmp_path, tokenizer):
    documents = make_documents(50)
    pack_split(documents, tokenizer, 16, fraction=0.0, folder=tmp_path)
    rows = all_rows(tmp_path / "train.arrow")
    stream = np.concatenate(encode_documents(tokenizer, documents))
    packed = [*rows[:, :-1].flatten().tolist(), rows[-1, -1].item()]
    assert packed == stream[: len(packed)].tolist()
    assert len(stream) - len(packed) < 16
    decoded = tokenizer.decode(packed).split(tokenizer.eos_token)
    assert decoded[:-1] == documents[: len(decoded) - 1]


def test_rows_come_in_the_order_asked_for_and_more_than_once(tmp_path, tokenizer):
    pack_split(make_documents(50), tokenizer, 16, fraction=0.0, folder=tmp_path)
    rows = PackedRows(tmp_path / "train.arrow")
    assert rows.rows([5, 2, 5]).dtype == torch.int64
    assert torch.equal(rows.rows([5, 2, 5]), all_rows(tmp_path / "train.arrow")[[5, 2, 5]])


def test_the_split_is_disjoint_and_stays_when_documents_are_added():
    documents = make_documents(4000)
    held_out = {text for text in documents if is_validation(text, 0.1)}
    assert 300 < len(held_out) < 500
    more = sorted({*documents, *make_documents(1000, seed=9)})
    assert {text for text in more if is_validation(text, 0.1)} & set(documents) == held_out
    assert held_out <= {text for text in documents if is_validation(text, 0.2)}
    assert not any(is_validation(text, 0.0) for text in documents)


def test_the_first_rows_of_a_stream(tmp_path, tokenizer):
    documents = make_documents(50)
    pack_first(documents, tokenizer, 16, rows=7, folder=tmp_path)
    stream = np.concatenate(encode_documents(tokenizer, documents))
    rows = all_rows(tmp_path / "validation.arrow")
    assert rows.shape == (7, 17)
    assert rows[:, :-1].flatten().tolist() == stream[: 7 * 16].tolist()


def test_a_corpus_too_short_for_a_row_is_named(local):
    with pytest.raises(ConfigError, match="data.seq_len=1000000 leaves no training sequence"):
        prepare_data(local("data.seq_len=1000000"), seed=0)


def test_a_split_too_small_for_a_row_is_named(local):
    with pytest.raises(ConfigError, match="data.validation_fraction=1e-09 holds out less than one sequence"):
        prepare_data(local("data.validation_fraction=1e-9"), seed=0)


def test_nothing_is_held_out_for_a_fraction_of_zero(local):
    assert len(prepare_data(local("data.validation_fraction=0.0"), seed=0).validation) == 0


def test_train_and_validation_of_a_corpus(local):
    data = prepare_data(local("data.validation_fraction=0.1"), seed=0)
    assert data.train_tokens is not None and data.train_tokens % 16 == 0
    assert data.validation.rows([0]).shape == (1, 17)
    documents = make_documents(300)
    held_out = [text for text in documents if is_validation(text, 0.1)]
    stream = np.concatenate(encode_documents(data.tokenizer, held_out))
    assert len(data.validation) == (len(stream) - 1) // 16


def test_the_fingerprint_names_what_a_position_means(local):
    fingerprints = [
        prepare_data(local(*overrides), seed=0).fingerprint
        for overrides in (
            [],
            [],
            ["data.seq_len=8"],
            ["data.validation_fraction=0.1"],
            ["data.tokenizer.vocab_size=330"],
        )
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len(set(fingerprints)) == 4
