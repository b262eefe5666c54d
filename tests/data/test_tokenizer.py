import re

import numpy as np
import pytest
import sentencepiece
from hard_texts import HARD_TEXTS
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lrtrain.data.encoding import encode_documents
from lrtrain.data.faults import Faults
from lrtrain.data.prepare import check_data, check_fits
from lrtrain.data.sources import PythonStdlib
from lrtrain.data.tokenizer import (
    from_sentencepiece,
    load_saved,
    sample,
    save_tokenizer,
    train_sentencepiece,
)
from lrtrain.errors import ConfigError

TEXTS = [*HARD_TEXTS, "\x00"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back_with_the_sign_for_a_space_as_a_space(tokenizer, text):
    ids = encode_documents(tokenizer, [text])[0]
    assert tokenizer.decode(ids[:-1]) == text.replace("▁", " ")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_sentencepiece(tokenizer, sentencepiece_model, text):
    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert tokenizer(text)["input_ids"] == original.encode(text)


def test_ids_of_real_code_are_those_of_sentencepiece_and_decode_to_it():
    documents = sample(PythonStdlib().documents(Faults(refuse=False)), 300_000)
    model = train_sentencepiece(documents, 1000)
    ours, original = from_sentencepiece(model), sentencepiece.SentencePieceProcessor(model_proto=model)
    for text, ids in zip(documents, encode_documents(ours, documents), strict=True):
        assert ours.decode(ids[:-1]) == text.replace("▁", " ")
        assert ids[:-1].tolist() == original.encode(text)


def test_autotokenizer_loads_what_was_saved(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as in an exported model
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text.replace("▁", " ")
    assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (1, 2, len(tokenizer))


def test_a_long_document_is_encoded_in_pieces_without_a_seam(tokenizer, monkeypatch):
    text = "\n".join(TEXTS * 5)
    whole = encode_documents(tokenizer, [text, "next"])
    monkeypatch.setattr("lrtrain.data.encoding.PIECE_CHARACTERS", 50)
    for ids, expected in zip(encode_documents(tokenizer, [text, "next"]), whole, strict=True):
        assert np.array_equal(ids, expected)


def test_the_sample_is_bounded_and_does_not_depend_on_the_order():
    documents = [f"document {i}" * 5 for i in range(200)]
    chosen = sample(documents, 1000)
    assert 1000 <= sum(map(len, chosen)) < 1100
    assert chosen == sample(reversed(documents), 1000)
    assert sorted(sample(documents, 10**6)) == sorted(documents)


def test_a_vocabulary_too_large_for_the_corpus_is_named():
    with pytest.raises(ConfigError, match=r"data.tokenizer.vocab_size=9999 is more .* give at most \d+"):
        train_sentencepiece(["hello world"], 9999)


def test_a_vocabulary_too_small_for_the_characters_is_named():
    with pytest.raises(ConfigError, match=r"data.tokenizer.vocab_size=262 is less .* give at least \d+"):
        train_sentencepiece(["hello world, all of you"], 262)


@pytest.mark.parametrize("text", ["ab", "abcdefghijkl", "aaaa bbbb aaaa"])
def test_the_sizes_that_are_offered_can_be_trained(text):
    """What is "at least" for a size too small is never above what is "at most" for one too large."""
    offered = []
    for size in (260, 5000):
        with pytest.raises(ConfigError) as raised:
            train_sentencepiece([text], size)
        offered += [int(number) for number in re.findall(r"give at (?:least|most) (\d+)", str(raised.value))]
    assert len(offered) == 2 and offered[0] <= offered[1]
    for size in offered:
        assert len(from_sentencepiece(train_sentencepiece([text], size))) == size


@pytest.mark.parametrize("size", [500_000_000, 10**20])
def test_a_vocabulary_that_no_corpus_supports_is_found_before_building(local, size):
    with pytest.raises(ConfigError, match=f"data.tokenizer.vocab_size={size} must be at most 1048576"):
        check_data(local(f"data.tokenizer.vocab_size={size}"))


def test_what_does_not_fit_the_model_is_found_before_text_is_read(local, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = local(f"data.tokenizer.path={tmp_path}/saved")
    check_fits(local(), vocab_size=320, longest=16)
    check_fits(saved, vocab_size=340, longest=None)
    with pytest.raises(ConfigError, match="model.vocab_size=319 is below the tokenizer's 320 pieces"):
        check_fits(local(), vocab_size=319, longest=None)
    with pytest.raises(ConfigError, match="model.vocab_size=339 is below the tokenizer's 340 pieces; .*saved"):
        check_fits(saved, vocab_size=339, longest=None)
    with pytest.raises(ConfigError, match="data.seq_len=16 is above the model's max_position_embeddings=15"):
        check_fits(local(), vocab_size=320, longest=15)


def test_an_empty_corpus_is_named():
    with pytest.raises(ConfigError, match="data.tokenizer.vocab_size=300 cannot be trained"):
        train_sentencepiece([], 300)


def test_a_vocabulary_below_the_bytes_is_found_before_building(local):
    with pytest.raises(ConfigError, match="data.tokenizer.vocab_size=100 must be above 259"):
        check_data(local("data.tokenizer.vocab_size=100"))


def test_a_saved_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="data.tokenizer.path=.*nowhere cannot be loaded"):
        load_saved(str(tmp_path / "nowhere"))


def test_a_saved_tokenizer_neither_truncates_nor_pads(tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)
    documents = encode_documents(load_saved(str(tmp_path)), TEXTS)
    for ids, expected in zip(documents, encode_documents(tokenizer, TEXTS), strict=True):
        assert np.array_equal(ids, expected)


def test_a_saved_tokenizer_without_eos_is_named(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    bare.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="data.tokenizer.path=.* has no EOS token"):
        load_saved(str(tmp_path))
