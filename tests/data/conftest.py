"""Configurations over small corpora, and one small tokenizer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from corpora import c4_config, local_config, make_documents
from transformers import PreTrainedTokenizerFast

from lrtrain.config.schema import DataConfig
from lrtrain.data.tokenizer import from_sentencepiece, train_sentencepiece

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def local(tmp_path: Path) -> MakeConfig:
    """Overrides → data=local over small files."""
    return partial(local_config, tmp_path)


@pytest.fixture
def c4(tmp_path: Path) -> MakeConfig:
    """Overrides → data=c4 over small local files."""
    return partial(c4_config, tmp_path)


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    return train_sentencepiece([*make_documents(300), "if x:\n    return\tx\n        y = 12"] * 2, 340)


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model: bytes) -> PreTrainedTokenizerFast:
    return from_sentencepiece(sentencepiece_model)
