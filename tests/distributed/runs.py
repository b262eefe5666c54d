"""Whole runs on real processes, several in the same ones."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from crew import Command, together, train_all
from launching import ROOT, command

from lrtrain.tracking.jsonl import series

OPT = [
    "model=opt_125m",
    "model.vocab_size=384",
    "model.config.hidden_size=48",
    "model.config.word_embed_proj_dim=48",
    "model.config.ffn_dim=96",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
]

ENGINES = {
    "fsdp": ["engine=fsdp"],
    "ddp": ["engine=ddp"],
    "zero1": ["engine=deepspeed", "engine.zero_stage=1"],
    "zero2": ["engine=deepspeed", "engine.zero_stage=2"],
    "zero3": ["engine=deepspeed", "engine.zero_stage=3"],
}

# Layers that are revised several times within six steps.
REVISED = {
    "sst": ["param=sst", "param.iteration=2", "param.round=2", "param.warmup=2"],
    "relora": ["param=relora", "param.merge_every=2", "param.prune=0.8", "param.prune_by=magnitude"],
}


def run_jobs(jobs: list[list[str]], processes: int, folder: Path) -> None:
    """Run configurations one after another in the same processes; the last one draws its picture."""
    together(train_all, (jobs,), folder, processes)


def losses(run: Path) -> dict[int, float]:
    """Training losses by step."""
    return dict(zip(*series(run / "metrics.jsonl", "train/loss"), strict=True))


def gap(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of two runs' losses."""
    assert one.keys() == other.keys() and one
    return max(abs(one[step] - other[step]) for step in one)


def base_of(name: str, tiny: list[str]) -> list[str]:
    """The tiny run, or for OPT the same with that architecture."""
    return [*OPT, *(o for o in tiny if not o.startswith("model"))] if name.startswith("opt") else tiny


def start(overrides: list[str], processes: int, folder: Path) -> Command:
    """The user's command, running."""
    return Command(ROOT / "launch" / "pretrain.py", overrides, folder, processes, merged=True)


def torchrun(overrides: list[str], processes: int, folder: Path) -> subprocess.Popen:
    """The user's command as it is typed, running: where what torchrun does is of interest."""
    line = command(overrides, processes)
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | Command, timeout: float = 120) -> None:
    """Until the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)


def logged_steps(run: Path) -> int:
    """Rows of losses that a run has written so far."""
    path = run / "metrics.jsonl"
    return path.read_text().count("train/loss") if path.exists() else 0


def workers(torchrun: subprocess.Popen) -> dict[int, int]:
    """Rank → process id of what torchrun started."""
    children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout.split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {
        int(entry.removeprefix(b"RANK=")): pid
        for pid, environment in environments.items()
        for entry in environment
        if entry.startswith(b"RANK=")
    }
