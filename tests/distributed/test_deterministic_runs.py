"""`train.deterministic` with every method."""

from pathlib import Path

import pytest
from launching import ROOT, TINY
from runs import losses, run_jobs

pytestmark = pytest.mark.full

PARAMS = sorted(path.stem for path in (ROOT / "conf" / "param").glob("*.yaml"))
OPTIMS = {"adamw": [], "muon": [], "galore": ["optim.gap=2"]}
EXECUTION = {"sltrain": ["param.execution=materialize"]}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_method_gives_the_same_bits_twice(tmp_path: Path, corpus: Path, processes: int):
    """With three optimizers, compiled, and under each engine; where it is compiled the second run is resumed."""
    base = [*TINY, "model.config.num_hidden_layers=1", f"data.path={corpus}", "train.deterministic=true"]
    base += ["schedule=constant", "schedule.warmup=0.0", "resume=auto"]
    optims = OPTIMS if processes == 1 else ["galore"]
    jobs = {
        f"{param}-{optim}": [f"param={param}", f"optim={optim}", *OPTIMS[optim], *EXECUTION.get(param, [])]
        for param in PARAMS
        for optim in optims
    }
    compiled = ("lowrank", "sltrain", "cola") if processes == 1 else ("lowrank", "sltrain")
    jobs |= {f"{param}-compiled": [*jobs[f"{param}-{[*optims][-1]}"], "train.compile=true"] for param in compiled}
    engines = {"ddp": ["engine=ddp"], "zero3": ["engine=deepspeed", "engine.zero_stage=3"]} if processes == 2 else {}
    jobs |= {f"sltrain-{name}": ["param=sltrain", *EXECUTION["sltrain"], *engine] for name, engine in engines.items()}
    runs = [
        [*base, *job, f"run.dir={tmp_path}/{name}-{time}", f"train.steps={steps}"]
        for name, job in jobs.items()
        for time, steps in ((1, 3), (2, 2), (2, 3))
        if steps == 3 or name.endswith("compiled")
    ]
    run_jobs(runs, processes, tmp_path)
    for name in jobs:
        first, second = (losses(tmp_path / f"{name}-{time}") for time in (1, 2))
        assert len(first) == 3 and first == second, name
