"""The plan's bytes on the wire and shards against what real processes send and hold."""

import json
from typing import Any

import pytest
import torch
from crew import together
from launching import SMALL
from traffic_job import measure

from lrtrain.config.compose import compose
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.schema import Config
from lrtrain.model.build import make_model
from lrtrain.planning.plan import memory_per_process
from lrtrain.planning.traffic import Hardware, Traffic, forecast, traffic

RUN = [*SMALL, "data.seq_len=16", "train.micro_batch_size=1"]
KINDS = {
    "dense": ["param=dense"],
    "sltrain": ["param=sltrain"],
    "tied": ["param=lowrank", "model.config.tie_word_embeddings=true"],
    "bf16": ["param=lowrank", "train.dtype=bf16", "engine.reduce_dtype=bf16"],
    "relora": ["param=relora"],
}


WIDER = ["model.vocab_size=4096", "model.config.hidden_size=128", "model.config.intermediate_size=344", "param.rank=32"]


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.full) for n in (1, 2, 4)])
def measured(request, cache, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """A step of each kind; on four processes also with two replicas, and with four."""
    base = [*RUN, f"train.batch_size={2 * request.param}"]
    jobs = {name: [*base, *change] for name, change in KINDS.items()}
    for passes in (1, 2):
        rows = ["data.seq_len=64", "train.micro_batch_size=4", f"train.batch_size={4 * passes * request.param}"]
        jobs[f"peak-{passes}"] = [*RUN, *WIDER, *rows, "param=sltrain", "param.execution=factored"]
        again = ["train.recompute_every=1", "model.vocab_size=512", "param.rank=8"]
        jobs[f"again-{passes}"] = [*jobs[f"peak-{passes}"], *again]
    if request.param == 4:
        jobs |= {f"replicas-{n}": [*base, "param=lowrank", f"engine.replicas={n}"] for n in (2, 4)}
        for name in ("dense", "lowrank", "lost"):
            jobs[f"tensor-{name}"] = [*base, f"param={name}", "engine.tensor=2"]
        jobs["peak-tensor"] = [*(o for o in jobs["peak-1"] if "execution" not in o), "param=lowrank", "engine.tensor=2"]
        jobs["tensor-bf16"] = [*base, "param=cola", "engine.tensor=2", "train.dtype=bf16", "train.recompute_every=1"]
        jobs["tensor-replicas"] = [*base, "param=lowrank", "engine.tensor=2", "engine.replicas=2"]
        jobs["ddp"] = [*base, "param=lowrank", "engine=ddp"]
    configs = [compose(*job) for job in jobs.values()]
    folder = tmp_path_factory.mktemp("traffic")
    peaks = [name.startswith(("peak", "again")) for name in jobs]
    together(measure, (configs, peaks, folder / "found.json"), folder, request.param)
    found = json.loads((folder / "found.json").read_text())
    plans = [plan_of(config, request.param) for config in configs]
    return {name: one | plan for name, one, plan in zip(jobs, found, plans, strict=True)}


def plan_of(config: Config, processes: int) -> dict[str, Any]:
    """What is planned for a step on so many processes."""
    model, dtype = make_model(config), compute_dtype(config, torch.device("cpu"))
    return {
        "processes": processes,
        "traffic": vars(traffic(config, model, dtype, processes)),
        "memory": vars(memory_per_process(config, model, dtype, processes)),
    }


def test_bytes_received_are_planned(measured: dict[str, dict[str, Any]]):
    for name, found in measured.items():
        for kind, planned in found["traffic"].items():
            assert found["received"][kind] == pytest.approx(planned, rel=0.01, abs=8), (name, kind)
        assert sum(found["traffic"].values()) > 0 or found["processes"] == 1


def test_shards_are_as_large_as_planned(measured: dict[str, dict[str, Any]]):
    for name, found in measured.items():
        for kind, held in found["held"].items():
            assert held == pytest.approx(found["memory"][kind], rel=0.1), (name, kind)


def test_the_peak_of_a_step_is_planned(measured: dict[str, dict[str, Any]]):
    """Recomputed blocks are all that is held there, and a block's backward pass has temporary tensors of its own."""
    for name, most in {"peak-1": 0.1, "peak-2": 0.1, "again-1": 0.25, "again-2": 0.25, "peak-tensor": 0.1}.items():
        if name not in measured:
            continue
        planned = measured[name]["memory"]
        still = sum(planned[kind] for kind in ("weights", "optimizer", "supports"))
        assert still + measured[name]["peak"] == pytest.approx(sum(planned.values()), rel=most), name


def test_mfu_lies_between_hidden_and_bare_communication():
    config = compose(*RUN, "train.batch_size=8")
    model, hardware = make_model(config), Hardware(flops=1e12, efficiency=0.5, bandwidth=1e9)
    alone = forecast(config, model, Traffic(0, 0, 0, 0), hardware, 1)
    assert alone.best_mfu == alone.worst_mfu == pytest.approx(0.5)
    sent = Traffic(round(alone.compute_seconds * 1e9), 0, 0, 0)  # as long as the arithmetic
    busy = forecast(config, model, sent, hardware, 1)
    assert busy.best_mfu == pytest.approx(0.5, rel=1e-3) and busy.worst_mfu == pytest.approx(0.25, rel=1e-3)
