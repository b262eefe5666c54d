"""The schema of `conf/data/*.yaml`. Every default is in the yaml."""

from dataclasses import dataclass
from typing import Any


@dataclass
class TokenizerConfig:
    """Where the tokenizer comes from: a saved one, or one trained on the corpus."""

    path: str | None  # a folder or hub name that AutoTokenizer loads; null trains one
    vocab_size: int | None  # pieces of the trained tokenizer; not read when `path` is given


@dataclass
class DataConfig:
    """What the model reads. `source` is instantiated by Hydra and may take keys of its own."""

    name: str
    source: dict[str, Any]
    path: Any  # files, folders or globs: a string or a list of strings; null where the source has its own
    text_field: str  # of the .jsonl, .json and .parquet rows
    streams: int | None  # canonical streams of a streamed source
    on_error: str  # skip or refuse: what to do about a document that cannot be read
    seq_len: int  # tokens the model sees; a stored row has one more
    validation_fraction: float  # of the documents, chosen by a hash of their text; 0 holds none out
    cache_dir: str
    tokenizer: TokenizerConfig
