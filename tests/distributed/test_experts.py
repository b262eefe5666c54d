"""Factorized experts in whole runs: on every engine, resumed, merged."""

from pathlib import Path

import pytest
import torch
from launching import TINY
from runs import gap, losses, run_jobs
from transformers import AutoModelForCausalLM

from lrtrain.checkpoint.export import export_dense
from lrtrain.checkpoint.loading import load
from lrtrain.checkpoint.weights import RunWeights

pytestmark = pytest.mark.full

MIXTURE = [
    *TINY,
    "model.config.model_type=mixtral",
    "+model.config.num_key_value_heads=2",
    "+model.config.num_local_experts=3",  # more on one process than on the other
    "+model.config.num_experts_per_tok=2",
    "+model.config.output_router_logits=true",
    "+model.config.router_aux_loss_coef=0.1",
    "train.steps=4",
]
VARIANTS = {
    "dense-muon": ["param=dense", "param.rank=null", "optim=muon"],
    "lowrank": ["param=lowrank"],
    "lowrank-galore": ["param=lowrank", "optim=galore"],
    "cola": ["param=cola"],
    "sltrain": ["param=sltrain", "param.execution=materialize"],
    "spectron": ["param=lowrank", "optim=spectron"],
    "bf16": ["param=lowrank", "train.dtype=bf16"],
}
ZERO = ["lowrank", "sltrain", "cola"]
TOLERANCE = {"bf16": 0.02}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    base = [*MIXTURE, f"data.path={corpus}"]

    def job(name: str, *more: str) -> list[str]:
        return [*base, *VARIANTS[name.partition("/")[2]], *more, f"run.dir={folder}/{name}"]

    run_jobs([job(f"one/{name}") for name in VARIANTS], 1, folder)
    two = [job(f"two/{name}") for name in VARIANTS]
    two += [
        job(f"zero{stage}/{name}", "engine=deepspeed", f"engine.zero_stage={stage}")
        for stage in (1, 2, 3)
        for name in ZERO
    ]
    two += [job(f"resumed/{name}", "train.steps=2", "schedule=constant") for name in ("lowrank", "spectron")]
    two += [job(f"resumed/{name}", "resume=auto", "schedule=constant") for name in ("lowrank", "spectron")]
    two += [job(f"whole/{name}", "schedule=constant") for name in ("lowrank", "spectron")]
    run_jobs(two, 2, folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_give_the_losses_of_one(runs: Path, name: str):
    assert gap(losses(runs / "one" / name), losses(runs / "two" / name)) < TOLERANCE.get(name, 2e-5)


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_gives_the_losses_of_one_process(runs: Path, stage: int, name: str):
    assert gap(losses(runs / "one" / name), losses(runs / f"zero{stage}" / name)) < 2e-5


@pytest.mark.parametrize("name", ["lowrank", "spectron"])
def test_a_resumed_run_is_the_same_bit_for_bit(runs: Path, name: str):
    whole, resumed = (RunWeights(runs / kind / name) for kind in ("whole", "resumed"))
    for key in whole.model.state_dict():
        assert torch.equal(whole.tensor(key), resumed.tensor(key)), key


@pytest.mark.parametrize("name", ["lowrank", "sltrain"])
def test_merged_experts_give_the_same_logits_in_transformers(runs: Path, tmp_path: Path, name: str):
    export_dense(RunWeights(runs / "two" / name), tmp_path / "out", None, 2**30)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load(runs / "two" / name).model(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, rtol=0, atol=1e-5)
