"""A small corpus, a model that trains in a second, and ways to start real processes."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    "model=llama_tiny",
    "model.vocab_size=384",
    "model.config.hidden_size=48",
    "model.config.intermediate_size=96",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "data=local",
    "data.seq_len=32",
    "data.validation_fraction=0.1",
    "param.rank=8",
    "train.batch_size=8",
    "train.micro_batch_size=2",
    "train.log_every=1",
    "eval.every=0",
    "eval.sequences=16",
    "checkpoint.every=0",
    "spectra.every=0",
    "tracking=none",
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps tokenizers and packed rows."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LRTRAIN_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 120 short documents with some structure to learn."""
    folder = tmp_path_factory.mktemp("corpus")
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnop", k=dice.randint(2, 7))) for _ in range(200)]
    for i in range(120):
        text = " ".join(dice.choices(words, weights=[1 / (k + 1) for k in range(200)], k=dice.randint(60, 200)))
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


@pytest.fixture
def tiny(cache: Path, corpus: Path) -> list[str]:
    """Overrides of a run that takes a second."""
    return [*TINY, f"data.path={corpus}"]


def command(overrides: list[str], processes: int) -> list[str]:
    """The user's command line."""
    script = str(ROOT / "launch" / "pretrain.py")
    if processes == 1:
        return [sys.executable, script, *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*torchrun, script, *overrides]


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `launch/pretrain.py` with overrides as a user would, in an empty folder, and wait for it."""

    def run(overrides: list[str], processes: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
        return subprocess.run(
            command(overrides, processes), cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )

    return run
