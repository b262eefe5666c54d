"""Small corpora, and the repository's own conf/data composed over them."""

import gzip
import json
import random
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lrtrain.config.schema import DataConfig
from lrtrain.config.values import validated

CONF = str(Path(__file__).resolve().parents[2] / "conf")
SYLLABLES = ["ka", "lo", "mi", "ne", "ru", "ta", "so", "vi", "xe", "zu"]


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 60 words of made-up syllables, some over two lines."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(200)]
    texts = [draw.choices(words, k=draw.randint(1, 60)) for _ in range(count)]
    return [f"{i}" + draw.choice(" \n") + " ".join(text) for i, text in enumerate(texts)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_json_gz(path: Path, texts: list[str]) -> Path:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text, "url": "u"}) + "\n" for text in texts)
    return path


def compose_data(choice: str, cache: Path, *overrides: str) -> DataConfig:
    """`conf/data/<choice>.yaml` with overrides, resolved and typed as the launcher does it."""
    fixed = [f"data.cache_dir={cache}", "+model.vocab_size=320", "data.seq_len=16"]
    with initialize_config_dir(CONF, version_base="1.3"):
        composed = compose(f"data/{choice}", [*fixed, *overrides])
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    return validated(DataConfig, cast(dict, plain)["data"], "data")


def local_config(folder: Path, *overrides: str) -> DataConfig:
    """data=local over 300 documents in `folder`."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_jsonl(corpus, make_documents(300))
    return compose_data("local", folder / "cache", f"data.path={corpus}", *overrides)


def c4_config(folder: Path, *overrides: str) -> DataConfig:
    """data=c4 over 7 small files in `folder` and 4 streams, so that a pass over a stream's files is short."""
    texts = make_documents(70)
    if not (folder / "c4-validation.00000-of-00001.json.gz").exists():
        for i in range(7):
            texts_of_file = [*texts[i * 10 : i * 10 + 5], "", *texts[i * 10 + 5 : i * 10 + 10]]
            write_json_gz(folder / f"c4-train.{i:05}-of-00007.json.gz", texts_of_file)
        write_json_gz(folder / "c4-validation.00000-of-00001.json.gz", make_documents(40, seed=1))
    fixed = [
        f"data.path={folder}/c4-train.*.json.gz",
        f"data.source.validation={folder}/c4-validation.*.json.gz",
        "data.source.validation_sequences=8",
        "data.streams=4",
    ]
    return compose_data("c4", folder / "cache", *fixed, *overrides)
