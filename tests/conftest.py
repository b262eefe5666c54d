"""A small corpus, a run that takes a second, and the user's command line as fixtures."""

import gc
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ROOT, TINY


def one_core_for_each_worker() -> None:
    """Parallel tests (pytest -n) do not share cores: OpenMP's threads spin while they wait for one another, and where
    several processes have two threads on the same two cores each, that takes several times as long.

    On its core a thread that wakes up waits for its turn (SCHED_BATCH): gloo's spins while the thread that it took the
    core from holds its lock, which was a fourth of the time of a small run on two processes."""
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


if "PYTEST_XDIST_WORKER" in os.environ:
    one_core_for_each_worker()  # before torch is imported, and for all that the tests start


def pytest_collection_finish() -> None:
    """What has been imported by now is not searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=4, help="how many processes test_kills.py kills")
    parser.addoption("--record-golden", action="store_true", help="record the losses that test_golden.py compares with")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--kills")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this session keeps tokenizers, packed rows, initial values and measurements: never in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LRTRAIN_CACHE"] = str(folder)
    return folder


@pytest.fixture(autouse=True)
def no_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes that a test names, which hold for its process, are forgotten after it."""
    monkeypatch.setenv("LRTRAIN_CONF", "")
    monkeypatch.setattr(sys, "path", [*sys.path])


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


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `launch/pretrain.py` with overrides as a user would, in an empty folder, and wait for it."""

    def run(overrides: list[str], processes: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
        from crew import Command  # not before this process has its core: it imports torch

        return Command(ROOT / "launch" / "pretrain.py", overrides, tmp_path, processes).result(timeout)

    return run
