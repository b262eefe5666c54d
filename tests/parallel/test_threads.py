"""The threads of a process: what the user says, else its share of what it may use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lrtrain.distributed import threads
from lrtrain.distributed.threads import cpu_quota, thread_count


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cores", lambda: [*range(8)])
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch):
    assert thread_count(1) == (8, "8 cores ÷ 1 process")
    assert thread_count(3)[0] == 2 and thread_count(16)[0] == 1


def test_what_the_user_says_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert thread_count(2) == (5, "OMP_NUM_THREADS=5")
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    assert thread_count(2)[0] == 4


def test_a_quota_counts_as_so_many_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: 4.5)
    assert thread_count(2) == (2, "4 cores by a CPU quota of 4.5 ÷ 2 processes")
    monkeypatch.setattr(threads, "cpu_quota", lambda: 0.5)
    assert thread_count(1)[0] == 1


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_quotas_of_both_versions_and_of_parents_are_read(tmp_path: Path):
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/user/job\n")
    write(root / "user/job/cpu.max", "max 100000\n")
    assert cpu_quota(groups, root) is None
    write(root / "user/cpu.max", "150000 100000\n")
    assert cpu_quota(groups, root) == 1.5

    groups.write_text("5:memory:/job\n3:cpu,cpuacct:/job\n0::/\n")
    write(root / "cpu,cpuacct/job/cpu.cfs_quota_us", "200000\n")
    write(root / "cpu,cpuacct/job/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(groups, root) == 2.0
    write(root / "cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(groups, root) is None
    assert cpu_quota(tmp_path / "none", root) is None


TORCHRUN = f"""
import os, subprocess, sys
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # as torchrun does
os.environ["TORCHELASTIC_RUN_ID"] = "none"
asks = "import runpy; print(runpy.run_path({threads.__file__!r})['threads_asked_for'](2))"
subprocess.run([sys.executable, "-c", asks])
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="what torchrun was started with cannot be told here")
@pytest.mark.parametrize(("given", "taken"), [(None, "None"), ("1", "1"), ("3", "3")])
def test_one_thread_that_torchrun_sets_is_told_from_one_that_the_user_sets(given: str | None, taken: str):
    environment = {**os.environ, **({"OMP_NUM_THREADS": given} if given else {})}
    done = subprocess.run([sys.executable, "-c", TORCHRUN], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == taken, done.stderr
