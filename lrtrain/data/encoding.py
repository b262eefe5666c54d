"""Texts to token ids, in memory that does not grow with the length of a text.

A long text is encoded in pieces, split where a letter or digit is followed by a space or a line end. Known
pre-tokenizers have no word that spans such a position: neither lrtrain's SentencePiece models, nor the regular
expressions of GPT-2, Llama 3, Qwen and o200k (where line ends only follow punctuation, and white space starts a word).
So the pieces give the same ids as the whole text. A tokenizer that changes the start of each text (Llama 2 adds a
space) is detected by encoding the beginning of the text both ways, and then encodes the whole text at once.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerFast

PIECE_CHARACTERS = 1 << 18  # longer words are split too
GROUP_CHARACTERS = 1 << 22  # encoded at a time, on all cores
TRIED_CHARACTERS = 1 << 14  # of a long text, encoded both ways to compare

SEAM = re.compile(r"(?<=[^\W_])(?=[ \n])")


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text, followed by EOS, int32. "</s>" within a text is not parsed as the special token."""
    if not tokenizer.backend_tokenizer.encode_special_tokens:  # set once: nobody else may use it meanwhile
        tokenizer.backend_tokenizer.encode_special_tokens = True
    pieces = [(i, piece) for i, text in enumerate(texts) for piece in _pieces_of(tokenizer, text)]
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    for group in _groups(pieces):
        for (i, _), found in zip(group, _encode(tokenizer, [piece for _, piece in group]), strict=True):
            ids[i].append(found)
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return [np.concatenate([*parts, eos]) for parts in ids]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


def _pieces_of(tokenizer: PreTrainedTokenizerFast, text: str) -> Iterable[str]:
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    beginning = next(_pieces(text, TRIED_CHARACTERS))
    whole, *parts = _encode(tokenizer, [beginning, *_pieces(beginning, max(1, len(beginning) // 8))])
    return _pieces(text, PIECE_CHARACTERS) if np.array_equal(np.concatenate(parts), whole) else [text]


def _pieces(text: str, most: int) -> Iterator[str]:
    """`text` in pieces of at most `most` characters, split at the last possible position of each."""
    start = 0
    while start < len(text):
        end = start + most
        if end < len(text):
            end = _last_seam(text, start + 1, end) or end
        yield text[start:end]
        start = end


def _last_seam(text: str, start: int, end: int) -> int | None:
    """The last position in [start, end] where the text can be split; searched backwards, in chunks."""
    while end > start:
        begin = max(start, end - 1000)
        seams = [match.start() for match in SEAM.finditer(text, begin, end + 1)]
        if seams:
            return seams[-1]
        end = begin
    return None


def _groups(pieces: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    characters = 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece[1])
        if characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
