"""Every optimizer on one, two and three processes, resumed, in the backward pass, with bfloat16 parameters."""

from pathlib import Path

import pytest
from launching import ROOT, TINY
from runs import gap, losses, run_jobs

pytestmark = pytest.mark.full

NAMES = sorted(path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml") if path.stem != "base")
# Refreshes within four steps; what is not for dense matrices has factors.
SETTINGS = {
    **dict.fromkeys(("galore", "fira", "apollo", "apollo_mini"), ["optim.gap=2"]),
    "dct_adamw": ["optim.gap=2", "optim.error_feedback=8bit"],
    "loro": ["optim.every=3"],
}
ON_SLTRAIN = {"adamw8bit", "apollo", "galore", "trion", "spectron", "loro", "preconditioned_adamw"}
WITHOUT_BACKWARD = {"loro"}
ON_THREE = {"adamw8bit", "dct_adamw", "galore", "muon"}  # rows that do not divide evenly
# A gradient that differs in its last bits rounds to another code, or turns close singular vectors of BA; noise of
# rounding is drawn by shard.
TOLERANCE = {"adamw8bit": 1e-3, "loro": 2e-3, "bf16_sr": 0.03}

SLTRAIN = ["param=sltrain", "param.execution=factored", "param.density=0.5"]  # vectors long enough to be quantized
JOBS = {
    name: [f"optim={name}", *SETTINGS.get(name, []), *(SLTRAIN if name in ON_SLTRAIN else ["param=dense"])]
    for name in NAMES
} | {"bf16_sr": ["optim=adamw8bit", "train.dtype=bf16_sr", *SLTRAIN]}


@pytest.fixture(scope="module")
def base(corpus) -> list[str]:
    return [
        *TINY,
        "model.config.num_hidden_layers=1",  # seven matrices of three shapes
        f"data.path={corpus}",
        "train.steps=4",
        "train.batch_size=12",
        "train.micro_batch_size=6",
        "optim.weight_decay=0.1",
        "schedule=constant",
        "schedule.warmup=0.0",
        "train.clip_by=parameter",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, base) -> Path:
    """Every optimizer, four steps on one, two and three processes; on two also from the checkpoint of the second step,
    and in the backward pass."""
    folder = tmp_path_factory.mktemp("optimizers")

    def at(where: str, *more: str, without: set[str] = frozenset()) -> list[list[str]]:
        return [
            [*base, *overrides, *more, f"run.dir={folder}/{where}-{name}"]
            for name, overrides in JOBS.items()
            if name not in without
        ]

    resumed = [
        [*base, *overrides, f"resume={folder}/two-{name}/checkpoints/step-00000002", f"run.dir={folder}/resumed-{name}"]
        for name, overrides in JOBS.items()
    ]
    backward = at("backward", "optim.in_backward=true", "spectra=off", without=WITHOUT_BACKWARD)
    run_jobs(at("one"), 1, folder)
    run_jobs(at("two", "checkpoint.every=2") + resumed + backward, 2, folder)
    run_jobs(at("three", "train.micro_batch_size=4", without=set(JOBS) - ON_THREE), 3, folder)
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_any_number_of_processes_gives_the_same_losses(runs: Path, name: str):
    most = TOLERANCE.get(name, 2e-5)
    one = losses(runs / f"one-{name}")
    assert len(one) == 4 and one[4] < one[1]
    assert gap(one, losses(runs / f"two-{name}")) < most
    if name in ON_THREE:
        assert gap(one, losses(runs / f"three-{name}")) < most


@pytest.mark.parametrize("name", JOBS)
def test_a_run_goes_on_from_a_checkpoint_as_it_went_bit_for_bit(runs: Path, name: str):
    whole = losses(runs / f"two-{name}")
    assert losses(runs / f"resumed-{name}") == {step: whole[step] for step in (3, 4)}


@pytest.mark.parametrize("name", sorted(set(JOBS) - WITHOUT_BACKWARD))
def test_updates_in_the_backward_pass_are_those_after_it(runs: Path, name: str):
    assert gap(losses(runs / f"two-{name}"), losses(runs / f"backward-{name}")) < TOLERANCE.get(name, 2e-5)
