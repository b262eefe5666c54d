"""A simulated step against what is known of it otherwise."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from launching import SMALL
from simulation_job import Job, simulated

RUN = [*SMALL, "model.config.num_hidden_layers=2", "data.seq_len=64", "train.micro_batch_size=4", "param.rank=8"]
IN_BACKWARD = [
    "param=sltrain",
    "optim=adamw8bit",
    "optim.in_backward=true",
    "train.dtype=bf16_sr",
    "train.clip_by=parameter",
]
JOBS: dict[str, Job] = {
    "one": ([*RUN, "param=dense", "train.batch_size=4", "train.dtype=fp32"], 1, 0),
    "four": ([*RUN, "param=dense", "train.batch_size=16"], 4, 1),
    "sharded": ([*RUN, "param=sltrain", "train.batch_size=256"], 64, 50),
    "ddp": ([*RUN, "param=lowrank", "train.batch_size=32", "engine=ddp"], 4, 3),
    "split": ([*RUN, "param=lowrank", "train.batch_size=32", "engine.tensor=2"], 8, 5),
    "in_backward": ([*RUN, *IN_BACKWARD, "train.batch_size=16"], 4, 2),
}


@pytest.fixture(scope="module")
def found(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return simulated(JOBS, tmp_path_factory.mktemp("simulated"))


def test_what_is_held_between_steps_is_weights_and_optimizer_state(found: dict[str, dict[str, Any]]):
    """A process of one shares with none, so nothing else is there but step counters; each of the 17 parameters' four
    tensors takes multiples of 512 bytes."""
    memory = found["one"]["memory"]
    assert 0 <= found["one"]["held"] - memory["weights"] - memory["optimizer"] < 17 * 4 * 512


def test_collectives_receive_the_planned_bytes(found: dict[str, dict[str, Any]]):
    for name, kind in {"four": "allgather", "sharded": "allgather", "ddp": "allreduce"}.items():
        traffic = found[name]["traffic"]
        received = sum(
            size for _, device, what, _, size in found[name]["collectives"] if device == "GPU" and kind in what
        )
        assert received == pytest.approx(traffic["gathered"] or traffic["replicated"], rel=0.02, abs=2000), name


def test_a_split_step_receives_the_planned_bytes(found: dict[str, dict[str, Any]]):
    split = found["split"]
    received = sum(size for _, device, _, _, size in split["collectives"] if device == "GPU")
    assert received == pytest.approx(sum(split["traffic"].values()), rel=0.02)
    assert split["traffic"]["latents"] > received / 5


def test_the_plan_is_within_3_percent_of_the_peak_of_a_small_model_too(found: dict[str, dict[str, Any]]):
    for name in ("four", "ddp"):
        assert sum(found[name]["memory"].values()) == pytest.approx(found[name]["peak"], rel=0.03), name


def test_executed_flops_are_the_models_own(found: dict[str, dict[str, Any]]):
    """But attention: its causal kernels do half of the products, 7 of them where the model counts 6."""
    one = found["one"]
    attention = one["flops"]["attention"]
    assert attention > 0
    assert one["flops"]["matmul"] + attention * 2 * 6 / 7 == pytest.approx(one["own_flops"], rel=1e-6)


def test_shards_without_an_entry_and_all_devices_are_right(found: dict[str, dict[str, Any]]):
    assert found["sharded"]["empty"] > 0 and found["one"]["empty"] == 0
    assert all(one["mixed"] == [] for one in found.values())


def test_fewer_processes_hold_more(found: dict[str, dict[str, Any]]):
    assert found["four"]["held"] < found["one"]["held"] < found["four"]["held"] * 4.5


WAITS_IN = "engine/base.py clip_and_step"
"""The line of lrtrain where the CPU waits for the GPU, once a step: loss, norm and what the processes have to say."""


def test_the_cpu_waits_for_the_gpu_once_a_step_and_for_no_other_cpu(found: dict[str, dict[str, Any]]):
    """Also where each parameter is clipped and stepped in the backward pass."""
    for name, one in found.items():
        waits = [(line, count) for _, line, _, count in one["syncs"]]
        assert [count for _, count in waits] == [1], (name, waits)
        file, _, function = waits[0][0].partition(":")
        assert f"{file} {function.partition(' ')[2]}" == WAITS_IN, name
        assert {device for _, device, *_ in one["collectives"]} <= {"GPU"}, name


LLAMA_7B = ["model=llama_7b", "model.config.num_hidden_layers=3", "data.seq_len=2048", "train.micro_batch_size=2"]
ENGINES = {"fsdp": [], "hsdp": ["engine.replicas=2"], "ddp": ["engine=ddp"]}


@pytest.mark.full
@pytest.mark.parametrize("param", ["dense", "lowrank", "sltrain"])
def test_the_plan_is_within_3_percent_of_the_simulated_peak(param: str, cache: Path, tmp_path: Path):
    jobs: dict[str, Job] = {}
    for gpus, engine, again, passes in itertools.product((1, 8, 64, 256), ENGINES, (0, 1), (1, 2)):
        if gpus > 1 or engine == "fsdp":
            batch = [f"train.batch_size={2 * gpus * passes}", f"train.recompute_every={again}"]
            overrides = [*LLAMA_7B, *batch, *ENGINES[engine], f"param={param}"]
            jobs[f"{gpus} {engine}, recompute {again}, {passes} passes"] = (overrides, gpus, min(3, gpus - 1))
    for name, step in simulated(jobs, tmp_path).items():
        assert sum(step["memory"].values()) == pytest.approx(step["peak"], rel=0.03), name


@pytest.mark.full
def test_7b_on_256_processes_is_simulated_in_two_minutes(cache: Path, tmp_path: Path):
    batch = ["train.batch_size=512", "train.micro_batch_size=2", "data.seq_len=2048"]
    (step,) = simulated({"7b": (["model=llama_7b", "param=sltrain", *batch], 256, 131)}, tmp_path).values()
    assert step["peak"] / 2**30 == pytest.approx(25.0, rel=0.03)
    assert step["took"] < 120 and step["mixed"] == []
    assert 0 < step["mfu"] < 0.5
