"""Whole runs on real processes, several in the same ones."""

import json
import subprocess
import sys
from pathlib import Path

from launching import ROOT

from lrtrain.tracking.jsonl import series

JOBS = str(ROOT / "tests" / "distributed" / "jobs.py")

OPT = [
    "model=opt_125m",
    "model.vocab_size=384",
    "model.config.hidden_size=48",
    "model.config.word_embed_proj_dim=48",
    "model.config.ffn_dim=96",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
]

# Layers that are revised several times within six steps.
REVISED = {
    "sst": ["param=sst", "param.iteration=2", "param.round=2", "param.warmup=2"],
    "relora": ["param=relora", "param.merge_every=2", "param.prune=0.8", "param.prune_by=magnitude"],
}


def run_jobs(jobs: list[list[str]], processes: int, folder: Path) -> None:
    """Run configurations one after another in the same processes; the last one draws its picture."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable] if processes == 1 else torchrun
    done = subprocess.run([*start, JOBS, json.dumps(jobs)], cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


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
