"""Two hosts train as one; when one is gone the other goes on from the last checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import PORT, Host, two_hosts
from launching import ROOT
from runs import gap, logged_steps, losses, run_jobs, wait_for

from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.checkpoint.meta import read_meta

pytestmark = pytest.mark.full


def torchrun(host: Host, meeting_point: Host, job: list[str], folder: Path) -> subprocess.Popen:
    """docs/multi_node.md's command on one host, with shorter waits."""
    command = [
        *[sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3"],
        *["--rdzv_backend=c10d", f"--rdzv_endpoint={meeting_point.address}:{PORT}", "--rdzv_id=test"],
        f"--rdzv_conf=is_host={host is meeting_point},last_call_timeout=4,keep_alive_interval=1",
        f"--local_addr={host.address}",
        *[str(ROOT / "launch" / "pretrain.py"), *job],
    ]
    with (folder / f"{host.name}.txt").open("w") as output:
        process = subprocess.Popen(host.command(command), cwd=folder, stdout=output, stderr=output)
    cores = sorted(os.sched_getaffinity(0))  # each host has its own, as far as they go round
    os.sched_setaffinity(process.pid, {cores[-1] if host is meeting_point else cores[0]})
    return process


def test_when_one_of_two_hosts_is_gone_the_other_goes_on_from_the_last_checkpoint(tmp_path: Path, tiny: list[str]):
    run = tmp_path / "run"
    base = [*tiny, "train.steps=20", "checkpoint.every=3", "checkpoint.keep=20", "param.execution=factored"]
    with two_hosts() as (stays, goes):
        job = [*base, f"run.dir={run}", "resume=auto"]
        first, second = (torchrun(host, stays, job, tmp_path) for host in (stays, goes))
        wait_for(lambda: logged_steps(run) > 7, second, 240)
        goes.kill()
        assert second.wait(20) != 0
        try:
            code = first.wait(240)
        finally:
            first.kill()
        said = (tmp_path / f"{stays.name}.txt").read_text()
        assert code == 0, said
    assert "going on from" in said
    sizes = {read_meta(checkpoint).world_size for checkpoint in whole_checkpoints(run / "checkpoints")}
    assert sizes == {1, 2}
    run_jobs([[*base, f"run.dir={tmp_path}/alone"]], 1, tmp_path)
    assert gap(losses(run), losses(tmp_path / "alone")) < 2e-5
