"""A head that is measured, tied to the embedding or not, or factorized, under every engine: losses, evaluations and
spectra are those of one process, and the run is exported. A tied head stays dense, whatever becomes of other layers."""

from pathlib import Path

import pytest
import torch
from launching import TINY
from runs import ENGINES, REVISED, gap, losses, run_jobs
from transformers import AutoModelForCausalLM

from lrtrain.checkpoint.export import export_dense, export_factorized
from lrtrain.checkpoint.loading import load
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.tracking.jsonl import read_metrics

pytestmark = pytest.mark.full

TIED = "model.config.tie_word_embeddings=true"
HEADS = {
    "measured": ["param=dense"],
    "measured-tied": ["param=dense", TIED],
    "revised-tied": [*REVISED["relora"], TIED, "param.pattern=layers"],
    "lowrank": ["param=lowrank"],
    "relora": REVISED["relora"],
    "sst": REVISED["sst"],
}
HSDP = ["engine=fsdp", "engine.replicas=2"]  # on four processes
TOLERANCE = {"sst": 1e-4}
"""In losses, else 2e-5; an SVD turns close singular vectors as the last bits fall."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    base = [
        *TINY, f"data.path={corpus}", "train.steps=3", "train.batch_size=8", "train.dtype=fp32", "eval.every=2",
        "spectra=full", "spectra.every=2", "param.pattern=.", "optim.lr=3e-3",
        "model.config.num_hidden_layers=1",
    ]  # fmt: skip

    def jobs(name: str, engine: list[str], processes: int) -> list[list[str]]:
        micro = f"train.micro_batch_size={4 // processes}"  # two a step on any number of processes
        return [[*base, *head, *engine, micro, f"run.dir={folder}/{name}-{key}"] for key, head in HEADS.items()]

    run_jobs(jobs("one", ENGINES["fsdp"], 1), 1, folder)
    run_jobs([job for name, engine in ENGINES.items() for job in jobs(name, engine, 2)], 2, folder)
    run_jobs(jobs("hsdp", HSDP, 4), 4, folder)
    return folder


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", [*ENGINES, "hsdp"])
def test_a_head_of_any_kind_trains_and_is_measured_as_on_one_process(runs: Path, engine: str, head: str):
    found, expected = (runs / f"{name}-{head}" for name in (engine, "one"))
    assert gap(losses(found), losses(expected)) < TOLERANCE.get(head, 2e-5)
    compared = set()
    rows = [read_metrics(run / "metrics.jsonl") for run in (found, expected)]
    for ours, theirs in zip(*rows, strict=True):
        for name, value in theirs["metrics"].items():
            if name.startswith(("eval/loss", "spectra/summary")):
                assert ours["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), (theirs["step"], name)
                compared.add(name.partition("/")[0])
    assert compared == {"eval", "spectra"}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", [*ENGINES, "hsdp"])
def test_what_was_trained_with_a_head_of_any_kind_loads_as_on_one_process(runs: Path, engine: str, head: str):
    ids = torch.arange(24)[None]
    with torch.no_grad():
        found, expected = (load(runs / f"{name}-{head}").model.eval()(ids).logits for name in (engine, "one"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_head_of_any_kind_is_exported_as_it_was_trained(runs: Path, tmp_path: Path, engine: str, head: str):
    run = RunWeights(runs / f"{engine}-{head}")
    export_dense(run, tmp_path / "dense", None, most=10**9)
    export_factorized(run, tmp_path / "factorized", None, most=10**9)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        expected = load(runs / f"{engine}-{head}").model(ids).logits
        for found in (plain, load(tmp_path / "factorized").model):
            torch.testing.assert_close(found.eval()(ids).logits, expected, rtol=0, atol=1e-5)
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert tied == head.endswith("tied")
