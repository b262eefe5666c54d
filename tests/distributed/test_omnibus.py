"""Every parameterization in one model, under every engine, on two processes and on three, with a resume in the middle:
each gradient of each step, and the parameters and optimizer states at the end, are those of one process."""

from pathlib import Path

import pytest
import torch
from launching import TINY
from runs import ENGINES, run_jobs

MODEL = [
    "param=dense", "param._target_=omnibus.layer", "param.pattern=.", "param.rank=6", "+model.config.mlp_bias=true",
    "+model.config.attention_bias=true", "train.dtype=fp32", "train.steps=4", "train.batch_size=6", "optim.lr=3e-3",
    "train.micro_batch_size=1", "optim.weight_decay=0.1", "checkpoint.every=2", "spectra.every=4", "eval.every=2",
]  # fmt: skip


def jobs(base: list[str], folder: Path, name: str, engine: list[str]) -> list[list[str]]:
    """A run, and one that goes on from its middle."""

    def job(kind: str, *more: str) -> list[str]:
        record = f"+callbacks.record={{_target_:omnibus.Record,file:'{folder}/{name}-{kind}.pt'}}"
        return [*base, *MODEL, *engine, f"run.dir={folder}/{name}-{kind}", record, *more]

    return [job("whole"), job("resumed", f"resume={folder}/{name}-whole/checkpoints/step-00000002")]


QUICK = {("fsdp", 3), ("zero3", 2)}


def run(folder: Path, corpus: Path, name: str, size: int) -> Path:
    run_jobs(jobs([*TINY, f"data.path={corpus}"], folder, name, ENGINES[name]), size, folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache: Path, corpus: Path) -> Path:
    return run(tmp_path_factory.mktemp("one"), corpus, "fsdp", 1)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((engine, size), marks=[] if (engine, size) in QUICK else pytest.mark.full, id=f"{engine}-{size}")
        for engine in ENGINES
        for size in (2, 3)
    ],
)
def several(request, tmp_path_factory, cache: Path, corpus: Path) -> tuple[Path, str]:
    engine, size = request.param
    return run(tmp_path_factory.mktemp(engine), corpus, engine, size), engine


def read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = torch.load(folder / f"{name}.pt")
    assert sum("gradient" in key for key in found) > 50 and sum(key.startswith("optimizer") for key in found) > 50
    return found


def test_every_gradient_parameter_and_state_is_that_of_one_process(one: Path, several: tuple[Path, str]):
    folder, engine = several
    found, expected = read(folder, f"{engine}-whole"), read(one, "fsdp-whole")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        gap = (found[name] - value).abs().max() if value.numel() else torch.zeros(())
        assert gap <= 2e-5 * max(1, value.abs().max()), (name, gap)


def test_what_goes_on_from_the_middle_is_the_same_bit_for_bit(several: tuple[Path, str]):
    folder, engine = several
    found, expected = read(folder, f"{engine}-resumed"), read(folder, f"{engine}-whole")
    assert {key for key in expected if not key.endswith(("step 1", "step 2"))} == found.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
