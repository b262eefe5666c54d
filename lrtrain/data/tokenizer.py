"""The tokenizer: a saved one, or a SentencePiece BPE model trained on the corpus, as a transformers tokenizer."""

import hashlib
import heapq
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from lrtrain.config.schema import TokenizerConfig
from lrtrain.core.cache import build_once, fingerprint
from lrtrain.data.faults import Faults
from lrtrain.data.sources import TextSource, nonempty
from lrtrain.errors import ConfigError

log = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 20_000_000  # enough for 32,000 pieces; more text changes little
MOST_PIECES = 1 << 20  # four times those of the largest in use
FIXED_PIECES = 3 + 256  # <unk>, <s>, </s> and the bytes
SPACE = "▁"  # U+2581, a space in SentencePiece and llama.cpp
SENTENCEPIECE = "tokenizer.model"  # read by llama.cpp's converter
SETTINGS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "max_sentence_length": 1 << 30,  # longer lines would be dropped silently
}


def load_tokenizer(
    cfg: TokenizerConfig, source: TextSource, cache_dir: Path, faults: Faults
) -> PreTrainedTokenizerFast:
    """The tokenizer of `cfg`; a trained one is built once per (source, size) and cached.

    Raises ConfigError if a saved one cannot be used, or the corpus does not support the size.
    """
    if cfg.path is not None:
        return load_saved(cfg.path)
    size = trained_size(cfg)
    key = fingerprint("tokenizer", source.fingerprint(cache_dir), size, SAMPLE_CHARACTERS, SETTINGS, SPACE)

    def build(folder: Path) -> None:
        log.info("training a tokenizer of %d pieces", size)
        model = train_sentencepiece(sample(nonempty(source.documents(faults), faults), SAMPLE_CHARACTERS), size)
        save_tokenizer(from_sentencepiece(model), folder)
        (folder / SENTENCEPIECE).write_bytes(model)

    return AutoTokenizer.from_pretrained(build_once(cache_dir / f"tokenizer-{key}", build))


def load_saved(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer at `path`, loaded by AutoTokenizer. Raises ConfigError if there is none, or it has no EOS."""
    tokenizer = read_tokenizer(os.path.expanduser(path), f"data.tokenizer.path={path}")
    if not tokenizer.is_fast:
        raise ConfigError(f"data.tokenizer.path={path} is slow; give one that has a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"data.tokenizer.path={path} has no EOS token; give one that has, it ends documents")
    tokenizer.backend_tokenizer.no_truncation()  # saved truncation or padding would change the documents
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def read_tokenizer(path: str | Path, named: str, trusted: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer at `path`, loaded by AutoTokenizer.

    Args:
        named: what the error calls the path.
        trusted: whether code from the folder may run.

    Raises:
        ConfigError: if there is none, or it is damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)
    except Exception as error:  # parsers of damaged files raise arbitrary exceptions
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{named} cannot be loaded: {reason}") from error


def trained_size(cfg: TokenizerConfig) -> int:
    """The number of pieces of a tokenizer to train. Raises ConfigError for a size that no corpus supports."""
    if cfg.vocab_size is None or cfg.vocab_size <= FIXED_PIECES:
        raise ConfigError(
            f"data.tokenizer.vocab_size={cfg.vocab_size} must be above {FIXED_PIECES}, the bytes and special tokens"
        )
    if cfg.vocab_size > MOST_PIECES:
        raise ConfigError(f"data.tokenizer.vocab_size={cfg.vocab_size} must be at most {MOST_PIECES}")
    return cfg.vocab_size


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A digest of everything that determines the ids of a text."""
    return fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


def sample(documents: Iterable[str], characters: int) -> list[str]:
    """The documents with the smallest hashes, of about `characters` in total; all of a small corpus.

    The sample does not depend on the order of the documents, and takes one pass with bounded memory.
    """
    chosen: list[tuple[int, str]] = []
    total = 0
    for text in documents:
        text = text[:characters]
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"sample").digest()
        heapq.heappush(chosen, (-int.from_bytes(digest), text))
        total += len(text)
        while total - len(chosen[0][1]) >= characters:
            total -= len(heapq.heappop(chosen)[1])
    return [text for _, text in sorted(chosen)]


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A serialized SentencePiece BPE model of exactly `vocab_size` pieces: <unk>, <s>, </s>, 256 bytes, text.

    Raises ConfigError if the texts do not support the size.
    """
    model = io.BytesIO()
    lines = (line for text in texts for line in text.split("\n") if line)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=os.cpu_count(),
            minloglevel=2,
            **SETTINGS,
        )
    except RuntimeError as error:
        raise ConfigError(f"data.tokenizer.vocab_size={vocab_size} {_what_would_do(str(error))}") from error
    return model.getvalue()


def from_sentencepiece(model: bytes) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that gives the same ids as SentencePiece.

    As in SentencePiece, "▁" (U+2581) encodes a space, so "▁" in a text decodes to a space.
    """
    trained = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [trained.id_to_piece(i) for i in range(len(trained))]
    special = [p for i, p in enumerate(pieces) if trained.is_control(i) or trained.is_unknown(i)]
    text = {p: i for i, p in enumerate(pieces) if p not in special and not trained.is_byte(i)}
    unk, bos, eos = (pieces[i] for i in (trained.unk_id(), trained.bos_id(), trained.eos_id()))
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=generate_merges(text, None),
            byte_fallback=True,
            unk_token=unk,
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    # No SentencePiece piece contains a line end, or a space after another character, so this split does not change
    # ids; it makes encoding several times faster, because repeated words are cached.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=unk,  # never used in texts, which fall back to bytes
        add_prefix_space=False,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer for transformers 4 and 5, and its SentencePiece model if it has one."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in both
        settings["add_bos_token"] = len(tokenizer.encode("")) > 0  # llama.cpp adds BOS by default
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False))
    model = Path(tokenizer.name_or_path) / SENTENCEPIECE
    if model.is_file():
        shutil.copyfile(model, folder / SENTENCEPIECE)


def _what_would_do(message: str) -> str:
    if most := re.search(r"value <= (\d+)", message):
        return f"is more than this corpus can support; give at most {most[1]}, or more text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"is less than the bytes and characters of this corpus; give at least {least[1]}, or more text"
    return f"cannot be trained on this corpus ({message}); give more text"
