"""The data of a run: validated before anything is built, then tokenized and packed."""

import json
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from transformers import PreTrainedTokenizerFast

from lrtrain.config.schema import DataConfig
from lrtrain.core.cache import build_once, cache_folder, fingerprint, why_not_writable
from lrtrain.data.faults import Faults, recorded_faults
from lrtrain.data.loader import PackedTrain, StreamedTrain, TrainData
from lrtrain.data.packing import PackedRows, pack_first, pack_split
from lrtrain.data.sources import JsonStream, TextSource, nonempty
from lrtrain.data.tokenizer import load_saved, load_tokenizer, tokenizer_fingerprint, trained_size
from lrtrain.errors import ConfigError

FAULTS = "faults.json"
PACKING_VERSION = 2  # increased when the same text gives other rows


@dataclass(frozen=True)
class Data:
    """Everything a run reads."""

    tokenizer: PreTrainedTokenizerFast
    train: TrainData
    validation: PackedRows
    fingerprint: str  # a hash of source, tokenizer, seq_len and split, which determine the sample at a position
    train_tokens: int | None  # targets in one epoch; None for a stream
    faults: Faults  # faults before training; `train.faults` has those of a stream


def check_data(cfg: DataConfig) -> None:
    """Raise ConfigError for errors that can be found without building anything."""
    if cfg.path is not None and cfg.source.keys() == {"_target_"}:
        raise ConfigError(f"data.path={cfg.path} has no effect on data={cfg.name}; add data=local")
    if reason := why_not_writable(_cache_dir(cfg)):
        raise ConfigError(f"data.cache_dir={_cache_dir(cfg)} {reason}; give one that can be written to")
    if cfg.tokenizer.path is not None:
        load_saved(cfg.tokenizer.path)
    else:
        trained_size(cfg.tokenizer)
    _source(cfg).check()


def check_fits(cfg: DataConfig, vocab_size: int, longest: int | None) -> None:
    """Raise ConfigError if tokenizer or sequences are too large for the model, before text is tokenized.

    Args:
        vocab_size: rows of the model's embedding.
        longest: its max_position_embeddings; None if it has no limit.
    """
    path = cfg.tokenizer.path
    pieces = len(load_saved(path)) if path is not None else trained_size(cfg.tokenizer)
    if pieces > vocab_size:
        lower = f"give a smaller one than data.tokenizer.path={path}" if path else "lower data.tokenizer.vocab_size"
        raise ConfigError(
            f"model.vocab_size={vocab_size} is below the tokenizer's {pieces} pieces; raise it, or {lower}"
        )
    if longest is not None and cfg.seq_len > longest:
        raise ConfigError(
            f"data.seq_len={cfg.seq_len} is above the model's max_position_embeddings={longest}, and its positions "
            f"cannot be raised; lower data.seq_len, or give a new model more by model.config"
        )


def prepare_data(cfg: DataConfig, seed: int) -> Data:
    """Tokenizer and rows of `cfg`, built or opened; `seed` decides the order of the epochs.

    Every process calls it, before or after the process group exists: it uses files and locks, no collectives.
    Raises ConfigError if the corpus cannot provide what `cfg` asks for.
    """
    source = _source(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer, source, _cache_dir(cfg), _faults(cfg))
    identity = fingerprint(
        PACKING_VERSION,
        source.fingerprint(_cache_dir(cfg)),
        tokenizer_fingerprint(tokenizer),
        cfg.seq_len,
        cfg.validation_fraction,
    )
    if isinstance(source, JsonStream):
        return _streamed(cfg, source, tokenizer, identity)
    return _packed(cfg, source, tokenizer, identity, seed)


def _packed(cfg: DataConfig, source: TextSource, tokenizer: PreTrainedTokenizerFast, identity: str, seed: int) -> Data:
    def build(folder: Path) -> None:
        faults = _faults(cfg)
        pack_split(nonempty(source.documents(faults), faults), tokenizer, cfg.seq_len, cfg.validation_fraction, folder)
        (folder / FAULTS).write_text(json.dumps(faults.as_dict()))

    folder = build_once(_cache_dir(cfg) / f"packed-{identity}", build)
    faults = _known_faults(folder, cfg)
    train, validation = PackedRows(folder / "train.arrow"), PackedRows(folder / "validation.arrow")
    if not len(train):
        raise ConfigError(f"data.seq_len={cfg.seq_len} leaves no training sequence; give less, or more text")
    if cfg.validation_fraction > 0 and not len(validation):
        raise ConfigError(
            f"data.validation_fraction={cfg.validation_fraction} holds out less than one sequence of "
            f"data.seq_len={cfg.seq_len}; give more or smaller documents, a larger fraction, or 0 for none"
        )
    return Data(tokenizer, PackedTrain(train, seed), validation, identity, len(train) * cfg.seq_len, faults)


def _streamed(cfg: DataConfig, source: JsonStream, tokenizer: PreTrainedTokenizerFast, identity: str) -> Data:
    count = source.validation_sequences

    def build(folder: Path) -> None:
        faults = _faults(cfg)
        pack_first(source.validation_documents(faults), tokenizer, cfg.seq_len, count, folder)
        (folder / FAULTS).write_text(json.dumps(faults.as_dict()))

    folder = build_once(_cache_dir(cfg) / f"validation-{fingerprint(identity, count)}", build)
    train = StreamedTrain(source.train_files(), source.text_field, source.streams, tokenizer, cfg.seq_len, _faults(cfg))
    return Data(tokenizer, train, PackedRows(folder / "validation.arrow"), identity, None, _known_faults(folder, cfg))


def _faults(cfg: DataConfig) -> Faults:
    return Faults(refuse=cfg.on_error == "refuse")


def _known_faults(folder: Path, cfg: DataConfig) -> Faults:
    """The faults when the rows in `folder` were packed, perhaps by an earlier run."""
    return recorded_faults(json.loads((folder / FAULTS).read_text()), cfg.on_error == "refuse")


def _source(cfg: DataConfig) -> TextSource:
    try:
        return instantiate(cfg.source, _convert_="all")
    except InstantiationException as error:
        reason = str(error).split("\n")[0]
        raise ConfigError(f"data.source={cfg.source} cannot be made ({reason}); see conf/data") from error


def _cache_dir(cfg: DataConfig) -> Path:
    return cache_folder() if cfg.cache_dir is None else Path(cfg.cache_dir).expanduser()
