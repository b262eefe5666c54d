"""The same run on one process and on two, for every parameterization."""

import json
from pathlib import Path

import pytest
from launching import TINY
from runs import REVISED, base_of, gap, losses, run_jobs

from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.checkpoint.meta import read_meta
from lrtrain.tracking.jsonl import read_metrics, series

pytestmark = pytest.mark.full

VARIANTS = {
    "dense": ["param=dense", "param.rank=null"],
    "lowrank": ["param=lowrank"],
    "sltrain-materialize": ["param=sltrain", "param.execution=materialize"],
    "sltrain-factored": ["param=sltrain", "param.execution=factored"],
    "sst": REVISED["sst"],
    "sltrain-density-0": ["param=sltrain", "param.density=0", "param.execution=factored"],  # values without entries
    "relora": [*REVISED["relora"], "schedule=cosine_restarts", "schedule.restart_warmup=1"],
    "nested-lasso": ["param=nested", "param.lasso=1e-2"],
    "nested-rank-1": ["param=nested", "param.rank=1", "param.lasso=1e-2"],  # fewer rows than processes
    "nested-shrinking": ["param=nested", "param.shrink_every=2", "param.shrink_threshold=0.2"],
    "sltrain-row-balanced": ["param=sltrain", "param.support=row_balanced", "param.execution=factored"],
    "sltrain-block": ["param=sltrain", "param.support=block", "param.block=16", "param.execution=factored"],
    "bf16": ["param=lowrank", "train.dtype=bf16"],
    "opt-tied": ["param=lowrank", "model.config.dropout=0.0"],
    "documents": ["param=lowrank", "data.document_mask=true", "train.recompute_every=1"],
    "lost": ["param=lost", "param.density=0.1"],
    "dlr": ["param=dlr"],
    "cola": ["param=cola"],
    "cola-bottleneck-compile": [
        "param=cola",
        "train.recompute_every=1",
        "train.recompute_keep=bottleneck",
        "train.compile=true",
    ],
    "recompute-compile": ["param=sltrain", "param.execution=factored", "train.recompute_every=2", "train.compile=true"],
}
# Enough for each revision; the others take 4.
STEPS = dict.fromkeys(("sst", "relora", "nested-shrinking"), 6)


TOLERANCE = {"bf16": 0.02}
# Relative, of what is measured: SVDs of nearly equal singular values make rounding larger, on some CPUs to 1.2e-4.
OF_SPECTRA = TOLERANCE | {"sst": 5e-4}

# To an engine like others of them, or run by another stage of it.
ALIKE = {"sltrain-materialize", "sltrain-row-balanced", "sltrain-block", "recompute-compile", "cola", "nested-lasso"}
ZERO = ["engine=deepspeed", "engine.persist_below=0"]
# What differs in how the model lies on the processes, with the variants that it is run for.
ENGINES = {
    "hsdp": (["engine.replicas=2"], ["dense", "lowrank"]),
    "zero1": ([*ZERO, "engine.zero_stage=1"], ["sltrain-factored", "sst", "opt-tied", "nested-shrinking"]),
    "zero2": ([*ZERO, "engine.zero_stage=2"], ["dense", "relora", "nested-lasso", "bf16"]),
    "zero3": ([*ZERO, "engine.zero_stage=3"], sorted(VARIANTS.keys() - ALIKE - {"sltrain-density-0"})),  # refuses it
    "offloaded": ([*ZERO, "engine.zero_stage=3", "engine.offload_optimizer=true"], ["nested-lasso"]),
    "ddp": (
        ["engine=ddp"],
        ["dense", "sltrain-factored", "sst", "nested-lasso", "nested-shrinking", "bf16", "opt-tied"],
    ),
}
ELSEWHERE = [(engine, name) for engine, (_, names) in ENGINES.items() for name in names]


@pytest.fixture(scope="module")
def variants(tmp_path_factory, cache, corpus) -> Path:
    """Every variant on one process and on two, and some on two by another engine."""
    folder = tmp_path_factory.mktemp("variants")
    base = [*TINY, f"data.path={corpus}", "train.micro_batch_size=2", "spectra.every=4", "optim.weight_decay=0.1"]

    def job(where: str, name: str, *more: str) -> list[str]:
        steps = f"train.steps={STEPS.get(name, 4)}"
        return [*base_of(name, base), *VARIANTS[name], steps, *more, f"run.dir={folder}/{where}-{name}"]

    run_jobs([job("one", name) for name in VARIANTS], 1, folder)
    others = [job(engine, name, *ENGINES[engine][0]) for engine, name in ELSEWHERE]
    run_jobs([job("two", name) for name in VARIANTS] + others, 2, folder)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_give_the_losses_of_one(variants: Path, name: str):
    assert gap(losses(variants / f"one-{name}"), losses(variants / f"two-{name}")) < TOLERANCE.get(name, 2e-5)


@pytest.mark.parametrize("engine,name", ELSEWHERE)
def test_every_engine_gives_the_losses_gradients_and_spectra_of_fsdp_on_one_process(
    variants: Path, engine: str, name: str
):
    assert gap(losses(variants / f"one-{name}"), losses(variants / f"{engine}-{name}")) < TOLERANCE.get(name, 2e-5)
    measured_alike(variants / f"one-{name}", variants / f"{engine}-{name}", name)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_evaluate_and_measure_as_one(variants: Path, name: str):
    measured_alike(variants / f"one-{name}", variants / f"two-{name}", name)


def measured_alike(one: Path, other: Path, name: str) -> None:
    """Two runs' evaluation, gradient norms and spectra agree to the tolerance of this variant."""
    tolerances = dict.fromkeys(("eval/loss", "train/grad_norm"), TOLERANCE.get(name, 1e-4))
    for key, rel in (tolerances | {"spectra/summary/all/erank_mean": OF_SPECTRA.get(name, 1e-4)}).items():
        (_, first), (_, second) = (series(run / "metrics.jsonl", key) for run in (one, other))
        assert first == pytest.approx(second, rel=rel), key


def test_executions_recomputation_and_compilation_do_not_change_the_losses(variants: Path):
    reference = losses(variants / "one-sltrain-materialize")
    assert gap(reference, losses(variants / "one-sltrain-factored")) < 2e-5
    assert gap(reference, losses(variants / "one-recompute-compile")) < 2e-5
    assert gap(losses(variants / "one-cola"), losses(variants / "one-cola-bottleneck-compile")) < 2e-5


def test_a_run_directory_holds_what_it_should(variants: Path):
    run = variants / "ddp-opt-tied"  # the last job, which draws a picture
    names = {p.name for p in run.iterdir()}
    assert {
        "tokenizer",
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
        "plots",
        "run.json",
        "spectra",
    } <= names
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 4 and summary["tokens"] == 4 * 8 * 32 and summary["world_size"] == 2
    assert 0 < summary["parameters"] < summary["parameters_dense"]
    assert list((run / "plots").glob("*.png"))
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["tokens"] == 4 * 8 * 32


def test_a_shrunken_run_ends_with_fewer_parameters_and_a_loss_for_each_rank(variants: Path):
    kept, shrunken = (json.loads((variants / f"two-{name}" / "summary.json").read_text())
                      for name in ("nested-lasso", "nested-shrinking"))  # fmt: skip
    assert shrunken["parameters"] < kept["parameters"] and shrunken["parameters_dense"] == kept["parameters_dense"]
    for summary in (kept, shrunken):
        assert summary["eval_loss_at_rank_share_1"] == summary["eval_loss"]
        assert summary["parameters_at_rank_share_1"] == summary["parameters"]
        assert summary["parameters_at_rank_share_0.5"] < summary["parameters"]
        assert summary["eval_loss_at_rank_share_0.5"] != summary["eval_loss"]
    cut = json.loads((variants / "zero3-nested-shrinking" / "summary.json").read_text())  # releases its parameters
    assert all(cut[key] == value for key, value in shrunken.items() if key.startswith("parameters"))
    (newest,) = whole_checkpoints(variants / "two-nested-shrinking" / "checkpoints")
    assert set(read_meta(newest).ranks.values()) <= set(range(1, 8))
