"""What two real processes do together: they start on an empty cache, read a stream and save its state."""

import json
import logging
from pathlib import Path

import pytest
from corpora import c4_config, local_config
from crew import together

from lrtrain import distributed
from lrtrain.config.schema import DataConfig
from lrtrain.data.prepare import prepare_data


def work(local: DataConfig, c4: DataConfig, folder: Path) -> None:
    rank = distributed.start().dist_rank  # so both begin together
    logging.basicConfig(level=logging.INFO, filename=folder / f"log-{rank}", force=True)
    packed = prepare_data(local, seed=0)
    train = prepare_data(c4, seed=0).train
    for position in range(0, 84, 12):  # two batches ahead of the state
        train.batch(position, 12, rank, 2)
    result = {"fingerprint": packed.fingerprint, "state": train.state(60)}
    (folder / f"result-{rank}").write_text(json.dumps(result))
    distributed.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where two processes have done their work."""
    folder = tmp_path_factory.mktemp("two")
    together(work, (local_config(folder), c4_config(folder), folder), folder)
    return folder


def results(folder: Path) -> list[dict]:
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("line", "times"), [("training a tokenizer", 2), ("packed 300 documents", 1)])
def test_one_builds_and_both_go_on(folder, line, times):
    """There are two tokenizers to train, one for each corpus."""
    logs = [(folder / f"log-{rank}").read_text() for rank in range(2)]
    assert sum(log.count(line) for log in logs) == times
    assert results(folder)[0]["fingerprint"] == results(folder)[1]["fingerprint"]


def test_the_state_of_two_processes_is_that_of_one(folder):
    alone = prepare_data(c4_config(folder), seed=0).train
    alone.batch(0, 60, 0, 1)
    assert [result["state"] for result in results(folder)] == [alone.state(60)] * 2
