"""The plan's bytes on the wire and shards against what real processes send and hold."""

import json
import subprocess
import sys

import pytest
from launching import ROOT, SMALL

from lrtrain.config import compose
from lrtrain.model import make_model
from lrtrain.traffic import Hardware, Traffic, forecast

RUN = [*SMALL, "data.seq_len=16", "train.batch_size=8", "train.micro_batch_size=1"]
KINDS = {
    "dense": ["param=dense"],
    "sltrain": ["param=sltrain"],
    "tied": ["param=lowrank", "model.config.tie_word_embeddings=true"],
    "bf16": ["param=lowrank", "train.dtype=bf16", "engine.reduce_dtype=bf16"],
    "relora": ["param=relora"],
}


@pytest.fixture(scope="module", params=[2, 4])
def measured(request, cache) -> dict[str, dict]:
    """One step of each kind; on four processes also with two replicas, and with four."""
    jobs = {name: [*RUN, *change] for name, change in KINDS.items()}
    if request.param == 4:
        jobs |= {f"replicas-{n}": [*RUN, "param=lowrank", f"engine.replicas={n}"] for n in (2, 4)}
        jobs["ddp"] = [*RUN, "param=lowrank", "engine=ddp"]
    script = str(ROOT / "tests" / "distributed" / "traffic_job.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = subprocess.run(
        [*torchrun, script, json.dumps([*jobs.values()])], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(jobs, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_bytes_received_are_planned(measured: dict[str, dict]):
    for name, found in measured.items():
        for kind, planned in found["traffic"].items():
            assert found["received"][kind] == pytest.approx(planned, rel=0.01, abs=8), (name, kind)
        assert sum(found["traffic"].values()) > 0


def test_shards_are_as_large_as_planned(measured: dict[str, dict]):
    for name, found in measured.items():
        for kind, held in found["held"].items():
            assert held == pytest.approx(found["memory"][kind], rel=0.1), (name, kind)


def test_mfu_lies_between_hidden_and_bare_communication():
    config = compose(*RUN)
    model, hardware = make_model(config), Hardware(flops=1e12, efficiency=0.5, bandwidth=1e9)
    alone = forecast(config, model, Traffic(0, 0, 0), hardware, 1)
    assert alone.best_mfu == alone.worst_mfu == pytest.approx(0.5)
    sent = Traffic(round(alone.compute_seconds * 1e9), 0, 0)  # as long as the arithmetic
    busy = forecast(config, model, sent, hardware, 1)
    assert busy.best_mfu == pytest.approx(0.5, rel=1e-3) and busy.worst_mfu == pytest.approx(0.25, rel=1e-3)
