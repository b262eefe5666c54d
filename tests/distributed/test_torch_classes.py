"""Classes of torch.optim in whole runs: on one process and two, by FSDP2 and ZeRO-1, resumed, in the backward pass."""

from pathlib import Path

import pytest
from launching import TINY
from runs import gap, losses, run_jobs

pytestmark = pytest.mark.full

CLASSES = ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
WAYS = {
    "zero1": ["engine=deepspeed", "engine.zero_stage=1"],
    "backward": ["optim.in_backward=true", "train.clip_by=parameter", "train.micro_batch_size=4"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("classes")

    def at(where: str, name: str, *more: str) -> list[str]:
        base = [*TINY, f"data.path={corpus}", "param=lowrank", "train.steps=4", "schedule=constant", "train.clip=null"]
        of = ["optim=torch", f"optim.of=torch.optim.{name}", "optim.other_lr=1e-3", "model.config.num_hidden_layers=1"]
        return [*base, *of, *more, f"run.dir={folder}/{where}-{name}"]

    two = [at("two", name, "checkpoint.every=2") for name in CLASSES]
    resumed = [
        at("resumed", name, f"resume={folder}/two-{name}/checkpoints/step-00000002", "train.steps=4")
        for name in CLASSES
    ]
    others = [at(way, name, *more) for way, more in WAYS.items() for name in CLASSES]
    run_jobs([at("one", name) for name in CLASSES], 1, folder)
    run_jobs([*two, *resumed, *others], 2, folder)
    return folder


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("way", ["two", *WAYS])
def test_all_ways_give_the_losses_of_one_process(runs: Path, name: str, way: str):
    found, wanted = losses(runs / f"{way}-{name}"), losses(runs / f"one-{name}")
    assert len(wanted) == 4 and wanted[4] != wanted[1]
    assert gap(found, wanted) < 2e-5


@pytest.mark.parametrize("name", CLASSES)
def test_a_resumed_run_has_the_losses_of_the_whole_one(runs: Path, name: str):
    whole = losses(runs / f"two-{name}")
    assert losses(runs / f"resumed-{name}") == {step: loss for step, loss in whole.items() if step > 2}
