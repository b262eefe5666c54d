"""Golden traces: the losses of fixed runs, so that a change that means to change nothing is seen to change nothing.

A change that means to change them records them anew: `python -m pytest tests/run/test_golden.py --record-golden`.
"""

import json
from pathlib import Path

import pytest
from crew import train

from lrtrain.tracking.jsonl import series

TRACES = Path(__file__).with_name("golden.json")
METHODS = "dense lowrank sltrain lost sst cola dlr nested relora".split()
MATRIX_OPTIMIZERS = "adamw8bit galore fira apollo dct_adamw muon trion".split()
PAIR_OPTIMIZERS = "preconditioned_adamw loro spectron".split()
RUNS = [(param, "adamw") for param in METHODS]
RUNS += [("dense", optim) for optim in MATRIX_OPTIMIZERS] + [("lowrank", optim) for optim in PAIR_OPTIMIZERS]
QUICK = [("sltrain", "adamw"), ("sst", "adamw"), ("lowrank", "spectron")]


@pytest.mark.parametrize(
    ("param", "optim"), [pytest.param(*run, marks=[] if run in QUICK else [pytest.mark.full]) for run in RUNS]
)
def test_losses_are_those_that_were_recorded(
    param: str, optim: str, tiny: list[str], tmp_path: Path, request: pytest.FixtureRequest
):
    """To 1e-6: other CPUs and numbers of threads round otherwise."""
    run = f"{param}-{optim}"
    revised = {"sst": ["param.iteration=3", "param.round=2"], "relora": ["param.merge_every=4"]}.get(param, [])
    train([*tiny, f"param={param}", f"optim={optim}", *revised, "train.steps=8", f"run.dir={tmp_path}/{run}"])
    losses = series(tmp_path / run / "metrics.jsonl", "train/loss")[1].tolist()
    traces = json.loads(TRACES.read_text()) if TRACES.exists() else {}
    if request.config.getoption("--record-golden"):
        TRACES.write_text(json.dumps(dict(sorted((traces | {run: losses}).items())), indent=1) + "\n")
    else:
        assert losses == pytest.approx(traces[run], rel=1e-6)
