"""Runs that start from trained weights: alike on any number of processes, exact at full rank, resumed without them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from crew import together, train
from launching import TINY
from runs import OPT, gap, losses, run_jobs

import lrtrain
from lrtrain import distributed
from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.checkpoint.export import export_dense, export_factorized
from lrtrain.checkpoint.weights import RunWeights
from lrtrain.config.check import check
from lrtrain.config.compose import compose
from lrtrain.errors import ConfigError
from lrtrain.init_from.start import Start
from lrtrain.model.build import make_model
from lrtrain.tracking.jsonl import series

pytestmark = pytest.mark.full

OUTPUTS = ["compress.by=outputs", "compress.sequences=32"]
STARTS = {
    "lowrank": ["param=lowrank"],
    "lowrank-outputs": ["param=lowrank", *OUTPUTS, "compress.budget=0.5"],
    "sltrain-outputs": ["param=sltrain", *OUTPUTS],
    "sltrain-chosen": ["param=sltrain", "param.select=residual", "compress.budget=0.6", "compress.ranks=tail"],
    "sltrain-blocks": ["param=sltrain", "param.support=block", "param.block=16", "param.select=residual", *OUTPUTS],
    "lost": [
        "param=lost",
        "param.density=0.1",
        "param.activation=none",
        "compress.budget=0.5",
        "compress.ranks=uniform",
    ],
    "sst": ["param=sst"],
    "relora": ["param=relora", "param.merge_every=2"],
    "nested-outputs": ["param=nested", *OUTPUTS],
    "opt-affine": ["param=lowrank", "model.config.dropout=0.0", *OUTPUTS, "compress.affine=true"],
    "dense": ["param=dense", "param.rank=null"],
}
FULL = {
    "full-lowrank": ["param=lowrank", "param.rank=1.0"],
    "full-outputs": ["param=lowrank", "param.rank=1.0", *OUTPUTS],
    "full-sltrain": ["param=sltrain", "param.rank=1.0", *OUTPUTS],
    "full-lost": ["param=lost", "param.rank=1.0", "param.activation=none"],
    "full-sst": ["param=sst"],
    "full-nested": ["param=nested", "param.rank=1.0"],
    "full-dlr": ["param=dlr", "param.rank=1.0", "param.activation=none"],
}
ZERO = {
    "lowrank-outputs": ["engine=deepspeed", "engine.zero_stage=3", "engine.persist_below=0"],
    "sltrain-chosen": ["engine=deepspeed", "engine.zero_stage=1"],
    "sst": ["engine=deepspeed", "engine.zero_stage=3"],
}
IDS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache, corpus) -> Path:
    """A dense run, an OPT run, and what starts from them: on one process, and on two."""
    folder = tmp_path_factory.mktemp("start")
    base = [*TINY, f"data.path={corpus}", "train.steps=2", "spectra=off"]
    opt = [*OPT, *(override for override in base if not override.startswith("model"))]
    dense = [[*base, "param=dense", "param.rank=null", "train.steps=12", f"run.dir={folder}/origin"]]
    dense += [[*opt, "param=dense", "param.rank=null", f"run.dir={folder}/origin-opt"]]

    def jobs(where: str, starts: dict[str, list[str]]) -> list[list[str]]:
        found = []
        for name, change in starts.items():
            origin = "origin-opt" if name.startswith("opt") else "origin"
            mine = [*(opt if name.startswith("opt") else base), f"init_from={folder}/{origin}", *change]
            found.append([*mine, f"run.dir={folder}/{where}-{name}"])
        return found

    zero = {name: [*STARTS[name], *engine] for name, engine in ZERO.items()}
    start = [*base, f"init_from={folder}/origin", "train.steps=0"]
    whole = [[*start, *change, f"run.dir={folder}/{name}"] for name, change in FULL.items()]
    run_jobs(dense + jobs("one", STARTS) + whole, 1, folder)
    run_jobs(jobs("two", STARTS) + jobs("zero", zero), 2, folder)
    return folder


def eval_losses(run: Path) -> list[float]:
    return list(series(run / "metrics.jsonl", "eval/loss")[1])


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    return lrtrain.load(path)(input_ids=IDS).logits


@pytest.mark.parametrize("name", STARTS)
def test_it_is_the_same_start_on_two_processes(folder: Path, name: str):
    one, two = folder / f"one-{name}", folder / f"two-{name}"
    assert gap(losses(one), losses(two)) < 1e-4
    (start, _), (other, _) = eval_losses(one), eval_losses(two)
    assert start == pytest.approx(other, abs=1e-4)
    assert RunWeights(one).meta.ranks == RunWeights(two).meta.ranks


@pytest.mark.parametrize("name", ZERO)
def test_it_is_the_same_start_under_zero(folder: Path, name: str):
    one, zero = folder / f"one-{name}", folder / f"zero-{name}"
    assert gap(losses(one), losses(zero)) < 1e-4
    assert eval_losses(zero)[0] == pytest.approx(eval_losses(one)[0], abs=1e-4)
    assert RunWeights(one).meta.ranks == RunWeights(zero).meta.ranks


@pytest.mark.parametrize("name", FULL)
def test_at_full_rank_it_is_the_dense_model(folder: Path, name: str):
    expected = logits(folder / "origin")
    assert (logits(folder / name) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_merged_and_a_dense_start_are_exact(folder: Path):
    (dense,) = set(eval_losses(folder / "origin"))
    for name in ("dense", "relora", "sst"):
        assert eval_losses(folder / f"one-{name}")[0] == pytest.approx(dense, abs=1e-5)


def test_what_it_costs_is_ordered_as_it_should(folder: Path):
    (dense,) = set(eval_losses(folder / "origin"))
    lowrank, random = (eval_losses(folder / f"one-{name}")[0] for name in ("lowrank", "sltrain-outputs"))
    assert dense < lowrank and random < lowrank


@pytest.mark.parametrize("name", ["lowrank-outputs", "sltrain-chosen", "lost"])
def test_a_budget_is_met(folder: Path, name: str):
    budget = RunWeights(folder / f"one-{name}").config.compress.budget
    assert budget is not None
    layers = RunWeights(folder / f"one-{name}").layers
    dense = sum(layer.in_features * layer.out_features for layer in layers.values())
    held = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    assert (budget - 0.05) * dense < held <= budget * dense
    if name != "lost":
        assert len({layer.rank for layer in layers.values()}) > 1  # not uniform


def test_a_chosen_support_is_kept_and_exported(folder: Path, tmp_path: Path):
    for name in ("sltrain-chosen", "sltrain-blocks"):
        run = RunWeights(folder / f"two-{name}")
        export_dense(run, tmp_path / f"{name}-dense", None, most=10**9)
        export_factorized(run, tmp_path / name, None, most=10**9)
        expected = logits(folder / f"two-{name}")
        assert torch.equal(logits(tmp_path / name), expected)
        assert (logits(tmp_path / f"{name}-dense") - expected).abs().max() < 1e-5


def before_and_after(first: list[list[str]], weights: Path, last: list[str]) -> None:
    """Train, remove the weights that were started from, and train again."""
    for job in first:
        train(job)
    shutil.rmtree(weights, ignore_errors=True)
    train(last)


def test_resuming_is_exact_and_needs_the_weights_no_more(folder: Path, tmp_path: Path, corpus: Path):
    """From an export, whose architecture and tokenizer the run has taken over."""
    export_dense(RunWeights(folder / "origin"), tmp_path / "weights", None, most=100_000)
    change = [*STARTS["sltrain-chosen"], "param.execution=factored", "schedule=constant", "schedule.warmup=0.0"]
    base = [*(o for o in TINY if not o.startswith("model")), f"data.path={corpus}", "model=hf", *change]
    base = [*base, f"init_from={tmp_path}/weights"]
    pieces = [*base, f"run.dir={tmp_path}/pieces", "resume=auto"]
    first = [[*base, f"run.dir={tmp_path}/whole", "train.steps=4"], [*pieces, "train.steps=2"]]
    together(before_and_after, (first, tmp_path / "weights", [*pieces, "train.steps=4"]), tmp_path)
    assert losses(tmp_path / "pieces") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4
    assert eval_losses(tmp_path / "whole")[0] == pytest.approx(eval_losses(folder / "one-sltrain-chosen")[0], abs=1e-5)
    assert whole_checkpoints(tmp_path / "pieces" / "checkpoints")


@pytest.fixture
def world():
    yield distributed.start()
    distributed.stop()


WRONG = {
    "param=cola": "init_from cannot start .*q_proj: .*param.activation=silu is not one matrix",
    "param=lost": "init_from cannot start .*q_proj: .*param.activation=silu is not one matrix",
    "param=sst compress.budget=0.5": "of which param=sst takes .* beside its factors",
    "param=lowrank compress.budget=0.001": "compress.budget=0.001 .* is too small",
    "param=lowrank compress.by=outputs compress.affine=true": "compress.affine=true fits biases, and .* has none",
    "param=lowrank model.config.hidden_size=96": "embed_tokens.weight of shape 384×48, the model of shape 384×96",
    "param=lowrank model.config.num_hidden_layers=3": "has no model.layers.2.* which the model has",
    "param=lowrank compress.by=data": "compress.by=data must be 'weights' or 'outputs'",
    "param=lowrank compress.affine=true": "compress.affine=true has no effect without a text",
    "param=lowrank compress.budget=2": "compress.budget=2 must be a share above 0 and at most 1, or null",
    "param=lowrank compress.budget=0.4 train.flops=1e12": "cannot be counted before compress.budget=0.4",
    "param=lowrank param.zero_init=o_proj": "param.zero_init=o_proj would drop",
    "param=sltrain init_from=null param.select=residual": "param.select=residual looks at trained weights",
    "model=hf init_from=null": "model.path has no value",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, tiny: list[str], world, overrides: str):
    changes = overrides.split()
    base = [o for o in tiny if "model=hf" not in changes or not o.startswith("model")]
    with pytest.raises(ConfigError, match=WRONG[overrides]):
        config = compose(*base, f"init_from={folder}/origin", f"run.dir={tmp_path}/run", *changes)
        check(config, 1)
        Start(config, make_model(config), world)
    assert not list(tmp_path.iterdir())


def test_a_compressed_model_without_training_is_a_run_like_others(folder: Path):
    summary = json.loads((folder / "full-lowrank" / "summary.json").read_text())
    assert summary["step"] == 0 and summary["eval_loss"] == pytest.approx(eval_losses(folder / "origin")[-1], abs=1e-5)
