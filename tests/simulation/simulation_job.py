"""Simulates steps in a process of their own, which has the simulated GPU until it ends."""

import json
from pathlib import Path
from typing import Any

import torch
from crew import together

from lrtrain.config.compose import compose
from lrtrain.config.schema import Config
from lrtrain.model.build import make_model
from lrtrain.planning.plan import memory_per_process
from lrtrain.planning.traffic import traffic
from lrtrain.simulation.roofline import mfu, whole
from lrtrain.simulation.step import Simulated, simulate

Job = tuple[list[str], int, int]
"""Overrides, number of processes, process rank."""


def simulated(jobs: dict[str, Job], folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of simulated steps, and what is planned for them, by name."""
    configs = {name: (compose("gpu=h100", *overrides), gpus, rank) for name, (overrides, gpus, rank) in jobs.items()}
    together(simulate_all, (configs, folder / "found.json"), folder, 1)
    return json.loads((folder / "found.json").read_text())


def simulate_all(configs: dict[str, tuple[Config, int, int]], out: Path) -> None:
    """The job of that process."""
    found = {name: figures(simulate(*job)) | planned(*job) for name, job in configs.items()}
    out.write_text(json.dumps(found))


def figures(step: Simulated) -> dict[str, Any]:
    counts = step.counts
    return {
        "peaks": step.peaks,
        "peak": step.peak,
        "held": step.held,
        "empty": step.empty_shards,
        "syncs": [[*where, count] for where, count in counts.syncs.items()],
        "mixed": [[*where, count] for where, count in counts.mixed.items()],
        "collectives": [[*which, work.count, work.bytes] for which, work in counts.collectives.items()],
        "kernels": {phase: sum(w.count for (p, _), w in counts.work.items() if p == phase) for phase in step.peaks},
        "flops": {kind: work.flops for kind, work in whole(step).kinds.items()},
        "own_flops": step.own_flops,
        "seconds": whole(step).seconds,
        "mfu": mfu(step),
        "took": step.took,
    }


def planned(config: Config, gpus: int, rank: int) -> dict[str, Any]:
    model = make_model(config)
    return {
        "traffic": vars(traffic(config, model, torch.bfloat16, gpus)),
        "memory": vars(memory_per_process(config, model, torch.bfloat16, gpus)),
    }
