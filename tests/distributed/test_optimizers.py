"""Every optimizer on one, two and three processes, resumed, in the backward pass, with bfloat16 parameters."""

from pathlib import Path

import pytest
from launching import ROOT, TINY
from runs import gap, losses, run_jobs

from lrtrain.checkpoint import whole_checkpoints

NAMES = sorted(path.stem for path in (ROOT / "conf" / "optim").glob("*.yaml") if path.stem != "base")
# Refreshes within six steps; what is not for dense matrices has factors.
SETTINGS: dict[str, list[str]] = {}
ON_PAIRS = {"spectron", "loro", "preconditioned_adamw"}
WITHOUT_BACKWARD = {"loro"}
# A gradient that differs in its last bits rounds to another code, turns a basis a little, or picks another column.
TOLERANCE = {"adamw8bit": 1e-3}


def jobs(name: str) -> dict[str, list[str]]:
    """Name → overrides of the runs of an optimizer, each on several numbers of processes."""
    own = [f"optim={name}", *SETTINGS.get(name, [])]
    sltrain = [*own, "param=sltrain", "param.execution=factored", "param.density=0.5"]  # values that are not too few
    plain = [*own, "param=lowrank" if name in ON_PAIRS else "param=dense"]
    return {f"{name}-plain": plain, f"{name}-sltrain": sltrain}


@pytest.fixture(scope="module")
def base(corpus) -> list[str]:
    return [
        *TINY,
        f"data.path={corpus}",
        "train.batch_size=12",
        "optim.weight_decay=0.1",
        "schedule=constant",
        "schedule.warmup=0.0",
        "train.clip_by=parameter",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, base) -> Path:
    """Every job for six steps on one, two and three processes; on two also in halves, and in the backward pass."""
    folder = tmp_path_factory.mktemp("optimizers")
    everything = {key: overrides for name in NAMES for key, overrides in jobs(name).items()}

    def at(where: str, *more: str, only: str = "", steps: int = 6) -> list[list[str]]:
        return [
            [*base, *overrides, *more, f"train.steps={steps}", f"run.dir={folder}/{where}-{key}"]
            for key, overrides in everything.items()
            if only in key and not ("in_backward" in "".join(more) and key.split("-")[0] in WITHOUT_BACKWARD)
        ]

    halves = at("halves", "resume=auto", steps=3) + at("halves", "resume=auto")
    run_jobs(at("one"), 1, folder)
    run_jobs(at("two") + halves + at("backward", "optim.in_backward=true", "train.micro_batch_size=6"), 2, folder)
    run_jobs(at("three", only="plain"), 3, folder)
    return folder


EACH = [key for name in NAMES for key in jobs(name)]


@pytest.mark.parametrize("key", EACH)
def test_any_number_of_processes_gives_the_same_losses(runs: Path, key: str):
    most = TOLERANCE.get(key.split("-")[0], 2e-5)
    one = losses(runs / f"one-{key}")
    assert len(one) == 6 and one[6] < one[1]
    assert gap(one, losses(runs / f"two-{key}")) < most
    if key.endswith("plain"):
        assert gap(one, losses(runs / f"three-{key}")) < most


@pytest.mark.parametrize("key", EACH)
def test_a_run_in_halves_is_the_run_as_a_whole_bit_for_bit(runs: Path, key: str):
    assert len(whole_checkpoints(runs / f"halves-{key}" / "checkpoints")) == 2
    assert losses(runs / f"halves-{key}") == losses(runs / f"two-{key}")


@pytest.mark.parametrize("key", [key for key in EACH if key.split("-")[0] not in WITHOUT_BACKWARD])
def test_updates_in_the_backward_pass_are_those_after_it(runs: Path, key: str):
    """Up to the order in which micro-batches are summed."""
    most = TOLERANCE.get(key.split("-")[0], 2e-5)
    assert gap(losses(runs / f"two-{key}"), losses(runs / f"backward-{key}")) < most
