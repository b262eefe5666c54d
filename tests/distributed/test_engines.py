"""Checkpoints that move between engines and numbers of processes, exact resumption, and gradients summed in bf16."""

from pathlib import Path

import pytest
from launching import TINY
from runs import ENGINES, REVISED, gap, losses, run_jobs

from lrtrain.tracking.jsonl import read_metrics

pytestmark = pytest.mark.full

METHODS = {
    "sltrain": ["param=sltrain", "param.execution=factored", "train.clip_by=parameter", "train.clip=0.1"],
    # With frozen vectors, unit norms, resets of states and step counters. Singular values far from zero: one that is
    # clamped there leaves the signs of its vectors open.
    "sst": [*REVISED["sst"], "param.init_std=0.3"],
}
# Processes, and the legs that they take one after another: run, engine, steps done at the end.
LEGS = [
    (2, [("journey", "fsdp", 3), ("elastic", "fsdp", 3)]),
    (1, [("journey", "zero3", 5), ("elastic", "fsdp", 6)]),
    (2, [("journey", "zero1", 7), ("journey", "ddp", 8)]),
    (3, [("journey", "zero2", 10), ("elastic", "fsdp", 9)]),
    (1, [("journey", "fsdp", 12)]),
]
TOLERANCE = {"sltrain": 2e-5, "sst": 1e-4}  # an SVD turns close singular vectors as the last bits fall


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, corpus) -> Path:
    """Whole runs of 12 steps on two processes, the same in parts by one engine after the other, and each engine's own
    second half. Gradients are summed over several micro-batches."""
    folder = tmp_path_factory.mktemp("engines")
    base = [
        *TINY, f"data.path={corpus}", "train.batch_size=12", "train.micro_batch_size=3", "optim.weight_decay=0.1",
        "optim.other_lr=2e-3", "optim.lr_ratio=2", "schedule=constant", "schedule.warmup=0.0",
    ]  # fmt: skip

    def job(run: str, method: str, engine: str, steps: int, spectra: str = "off") -> list[str]:
        more = ["resume=auto", f"train.steps={steps}", f"spectra={spectra}", f"run.dir={folder}/{run}-{method}"]
        return [*base, *(REVISED | METHODS)[method], *ENGINES[engine], *more]

    looking = ["spectra.every=2", "checkpoint.every=2"]
    wholes = [[*job(f"whole-{engine}", "sltrain", engine, 4, "full"), *looking] for engine in ENGINES]
    second = "checkpoints/step-00000002"
    halves = [
        [*job(f"half-{engine}", "sltrain", engine, 4), f"resume={folder}/whole-{engine}-sltrain/{second}"]
        for engine in ENGINES
    ]
    reduced = [
        [*job(f"bf16-reduce-{engine}", "sltrain", engine, 4), "engine.reduce_dtype=bf16"]
        for engine in ("fsdp", "zero2")
    ]
    resumed = [
        [*job(f"{half}-zero3", method, "zero3", 4), "checkpoint.every=2", *more]
        for method in REVISED
        for half, more in (("whole", []), ("half", [f"resume={folder}/whole-zero3-{method}/{second}"]))
    ]
    stays = [*[job("whole", method, "fsdp", 12) for method in METHODS], *wholes, *halves, *reduced, *resumed]
    for processes, legs in LEGS:
        micro = ["train.micro_batch_size=2"] if processes == 3 else []  # of four rows
        moves = [
            [*job(run, method, engine, steps), *micro]
            for run, engine, steps in legs
            for method in (METHODS if run == "journey" else ["sltrain"])
        ]
        run_jobs([*stays, *moves], processes, folder)
        stays = []  # with the first ones
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_from_engine_to_engine_as_if_it_had_stayed(runs: Path, method: str):
    found, expected = losses(runs / f"journey-{method}"), losses(runs / f"whole-{method}")
    assert found.keys() == expected.keys() == set(range(1, 13))
    assert gap(found, expected) < TOLERANCE[method]


def test_from_two_processes_to_one_to_three_data_and_losses_stay(runs: Path):
    found, expected = losses(runs / "elastic-sltrain"), losses(runs / "whole-sltrain")
    assert found.keys() == set(range(1, 10))
    assert gap(found, {step: expected[step] for step in found}) < 2e-5
    assert read_metrics(runs / "elastic-sltrain" / "metrics.jsonl")[-1]["tokens"] == 9 * 12 * 32


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_goes_on_from_a_checkpoint_as_it_went_bit_for_bit(runs: Path, engine: str):
    whole = losses(runs / f"whole-{engine}-sltrain")
    assert losses(runs / f"half-{engine}-sltrain") == {step: whole[step] for step in (3, 4)}


@pytest.mark.parametrize("method", REVISED)
def test_zero_3_goes_on_bit_for_bit_after_a_merge_or_a_revision(runs: Path, method: str):
    """With small parameters whole on every process, as they are by default."""
    whole = losses(runs / f"whole-zero3-{method}")
    assert losses(runs / f"half-zero3-{method}") == {step: whole[step] for step in (3, 4)}


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "fsdp"])
def test_spectra_of_weights_gradients_updates_and_states_are_those_of_fsdp(runs: Path, engine: str):
    ours, expected = (read_metrics(runs / f"whole-{name}-sltrain" / "metrics.jsonl") for name in (engine, "fsdp"))
    compared = set()
    for row, reference in zip(ours, expected, strict=True):
        for name, value in reference["metrics"].items():
            if name.startswith(("spectra/summary", "gradients/summary", "updates/summary", "hidden/")):
                assert row["metrics"][name] == pytest.approx(value, rel=1e-2), name
                compared.add(name.partition("/")[0])
    assert compared == {"spectra", "gradients", "updates", "hidden"}


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_gradients_summed_in_bf16_change_the_losses_a_little(runs: Path, engine: str):
    assert 0 < gap(losses(runs / f"bf16-reduce-{engine}-sltrain"), losses(runs / f"whole-{engine}-sltrain")) < 0.01
