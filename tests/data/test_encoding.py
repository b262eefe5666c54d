"""A long text has the ids of the whole, whoever made the tokenizer, in the memory of a short one."""

import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lrtrain.data import encoding
from lrtrain.data.encoding import encode_documents

LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
ALPHABET = [
    "ab",
    "b",
    "12",
    "3456",
    " ",
    "  ",
    "\n",
    "\n\n",
    "!",
    "_",
    ".\n",
    "'s",
    "é",
    "東京",
    "\t",
    "\r\n",
    "-",
    " x",
]


def odd_text(count: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=count))


def trained(pre_tokenizer, normalizer=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<unk>", "</s>"])  # pyright: ignore
    backend.train_from_iterator([odd_text(3000, seed) for seed in range(3)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def made(name: str, ours: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name == "gpt2":
        return trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if name == "llama3":
        return trained(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), byte_level]))  # pyright: ignore
    if name == "llama2":
        return trained(byte_level, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))  # pyright: ignore
    return ours


@pytest.mark.parametrize("name", ["ours", "gpt2", "llama3", "llama2"])
def test_the_pieces_of_a_long_text_have_the_ids_of_the_whole(tokenizer, monkeypatch, name):
    chosen = made(name, tokenizer)
    texts = [odd_text(2000, 7), "short", odd_text(500, 8)]
    whole = encode_documents(chosen, texts)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 150)
    monkeypatch.setattr(encoding, "GROUP_CHARACTERS", 400)
    monkeypatch.setattr(encoding, "TRIED_CHARACTERS", 100)
    for ids, expected in zip(encode_documents(chosen, texts), whole, strict=True):
        assert np.array_equal(ids, expected)


def test_pieces_are_small_and_make_up_the_text():
    text = odd_text(3000, 1)
    pieces = list(encoding._pieces(text, 100))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 100 and len(pieces) < len(text) / 50
    assert [len(piece) for piece in encoding._pieces("x" * 250, 100)] == [100, 100, 50]
