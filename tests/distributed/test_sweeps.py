"""Sweeps on two real processes: one job after another, whatever happens to one of them."""

import importlib
import json
import os
import signal
from pathlib import Path

import pytest
from crew import Command
from launching import ROOT, TINY
from omegaconf import OmegaConf
from runs import gap, losses, run_jobs, torchrun, wait_for

from lrtrain.checkpoint.checkpointer import whole_checkpoints
from lrtrain.errors import ConfigError
from lrtrain.sweeps.jobs import Sweep, job_name

pytestmark = pytest.mark.full

PRETRAIN = ROOT / "launch" / "pretrain.py"

# Runs launch/pretrain.py with jobs in which only process 1 fails, or is killed, in the middle of a step.
FAULTY = """
import os, runpy, sys
sys.path[:0] = [{launch!r}, {root!r}]
import lrtrain.run.loop as loop
step = loop.take_step
def failing(run, rows, waited):
    if run.world.dist_rank == 1 and run.progress.step == 1:
        if run.config.param["rank"] == 6:
            raise MemoryError("none is left here")
        if run.config.param["rank"] == 7:
            os.kill(os.getpid(), 9)
    return step(run, rows, waited)
loop.take_step = failing
sys.argv[0] = {launch!r} + "/pretrain.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def sweep(overrides: list[str], processes: int, folder: Path, script: Path = PRETRAIN) -> Command:
    """A sweep as a user starts it, or by another script."""
    return Command(script, ["-m", *overrides], folder, processes, merged=True)


def jobs_of(folder: Path) -> dict[str, dict[str, str]]:
    """Readable part of a job's name → how it ended."""
    return {name.rpartition("-")[0]: ended for name, ended in json.loads((folder / "jobs.json").read_text()).items()}


def job_dir(folder: Path, name: str) -> Path:
    (found,) = (path for path in folder.iterdir() if path.name.rpartition("-")[0] == name)
    return found


@pytest.fixture(scope="module")
def base(cache: Path, corpus: Path) -> list[str]:
    rest = [override for override in TINY if not override.startswith("param.rank")]
    return [*rest, f"data.path={corpus}", "param.execution=factored", "run.name=s"]


ENGINES = ["engine=fsdp,deepspeed", "train.steps=4", "checkpoint.every=1"]


@pytest.fixture(scope="module")
def faulty(base: list[str], tmp_path_factory) -> tuple[Path, int, str]:
    """A sweep in which one rank does not exist, and process 1 fails alone at another and is killed at a third: its
    folder, exit code, output."""
    folder = tmp_path_factory.mktemp("faulty")
    script = folder / "faulty.py"
    script.write_text(FAULTY.format(launch=str(ROOT / "launch"), root=str(ROOT)))
    process = sweep([*base, *ENGINES, "param.rank=6,900,7,8"], 2, folder, script)
    output, _ = process.communicate(timeout=400)
    return folder / "runs" / "s", process.returncode, output


def test_one_process_that_fails_ends_its_job_and_no_other(faulty: tuple[Path, int, str]):
    folder, code, output = faulty
    assert code == 1, output
    ended = {
        "rank6": {"status": "failed", "detail": "process 1: MemoryError: none is left here"},
        "rank900": {
            "status": "failed",
            "detail": "param.rank=900 is not between 1 and min(in, out)=48 of model.layers.0.self_attn.q_proj",
        },
        "rank7": {"status": "failed", "detail": "process 1: killed by SIGKILL"},
        "rank8": {"status": "finished", "detail": ""},
    }
    assert jobs_of(folder) == {f"{engine}-{k}": one for engine in ("fsdp", "deepspeed") for k, one in ended.items()}
    assert output.index("param.rank=900 is not") < output.index("step 1/4")  # told before anything is trained
    assert "6 of 8 jobs failed" in output and output.count("none is left here") >= 6  # traceback, line, table


def test_a_job_after_one_that_failed_is_the_one_that_runs_alone(faulty: tuple[Path, int, str], base, tmp_path: Path):
    folder, *_ = faulty
    run_jobs([[*base, "param.rank=8", "train.steps=4", f"run.dir={tmp_path}/alone"]], 2, tmp_path)
    alone = losses(tmp_path / "alone")
    assert losses(job_dir(folder, "fsdp-rank8")) == alone
    assert gap(losses(job_dir(folder, "deepspeed-rank8")), alone) < 2e-5


def test_the_same_line_tries_again_what_failed_and_only_that(faulty: tuple[Path, int, str], base):
    folder, *_ = faulty
    before = (job_dir(folder, "deepspeed-rank8") / "metrics.jsonl").read_bytes()
    again = sweep([*base, *ENGINES, "param.rank=6,8"], 1, folder.parent.parent)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    ended = {name: one["status"] for name, one in jobs_of(folder).items() if name.endswith(("rank6", "rank8"))}
    assert len(ended) == 4 and {*ended.values()} == {"finished"}
    assert (job_dir(folder, "deepspeed-rank8") / "metrics.jsonl").read_bytes() == before


def test_an_interrupted_sweep_goes_on_with_the_job_it_was_in(base: list[str], tmp_path: Path):
    """SIGTERM to one process; the losses of all jobs are those of the sweep that was not interrupted, bit for bit."""
    line = [*base, "train.steps=12", "schedule=constant", "optim.lr=1e-3,2e-3", "param.rank=8"]
    first = sweep(line, 2, tmp_path)
    run = tmp_path / "runs" / "s"
    wait_for(lambda: any(len(losses(path.parent)) > 3 for path in run.glob("*/metrics.jsonl")), first)
    os.kill(first.members[1].pid, signal.SIGTERM)
    output, _ = first.communicate(timeout=200)
    assert first.returncode == 0 and "stopped at step" in output and "not started" in output, output
    (interrupted,) = (path for path in run.iterdir() if path.is_dir())
    assert not (interrupted / "summary.json").exists() and whole_checkpoints(interrupted / "checkpoints")

    second = sweep(line, 2, tmp_path)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0 and "going on from" in output, output
    (tmp_path / "whole").mkdir()
    whole = torchrun(["-m", *line], 2, tmp_path / "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    for name in ("lr0.001", "lr0.002"):
        found = losses(job_dir(run, name))
        assert len(found) == 12 and found == losses(job_dir(tmp_path / "whole" / "runs" / "s", name))


# --- jobs in processes of their own, and searches --------------------------------------------------------------------


def test_jobs_as_torchruns_of_their_own_say_how_they_ended(base: list[str], tmp_path: Path):
    more = ["hydra/launcher=torchrun", "hydra.launcher.parallel=2", "train.steps=2", "train.max_skipped=1"]
    process = sweep([*base, *more, "param.rank=8", "optim.lr=1e-3,1e38"], 1, tmp_path)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 1, output
    ended = jobs_of(tmp_path / "runs" / "s")
    assert {name: one["status"] for name, one in ended.items()} == {"lr0.001": "finished", "lr1e+38": "failed"}
    assert ended["lr1e+38"]["detail"].startswith("the loss or gradient was not finite for train.max_skipped=1")


LAUNCHERS = {
    "in_turn": [],
    "torchrun": ["hydra.launcher.nproc=1"],
    "slurm": ["hydra.launcher.cluster=local", "hydra.launcher.nproc=1", "hydra.launcher.settings={timeout_min: 5}"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_are_composed_from_the_same_files_by_every_launcher(launcher: str, base: list[str], tmp_path: Path):
    """--config-name, --config-dir and hydra.searchpath: in the run's own record of what it was trained with."""
    files = {
        "own/mybase.yaml": "defaults: [pretrain, _self_]\ntrain: {seed: 7}",
        "more/optim/mine.yaml": "defaults: [adamw, _self_]\neps: 1e-7",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    options = [f"--config-dir={tmp_path}/own", "--config-name=mybase", f"hydra.searchpath=[file://{tmp_path}/more]"]
    where = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    process = sweep([*options, *where, *base, "optim=mine", "train.steps=1", "param.rank=4"], 1, tmp_path)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    (run,) = (path.parent for path in (tmp_path / "runs" / "s").glob("*/summary.json"))
    trained = OmegaConf.load(run / "config.yaml")
    assert (trained.train.seed, trained.optim.eps) == (7, 1e-7)


def test_jobs_of_another_configuration_have_other_names():
    names = {job_name(["param.rank=8"], ["param.rank"], config_name) for config_name in ("pretrain", "mybase", "other")}
    assert len(names) == 3 and all(name.startswith("rank8-") for name in names)


def test_jobs_with_a_torchrun_of_their_own_are_not_started_under_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher = importlib.import_module("hydra_plugins.sweeps").TorchrunLauncher(nproc=1, parallel=1)
    launcher.sweep = Sweep("s", Path("s"), [])
    with pytest.raises(ConfigError, match="starts each job's processes itself: use python, not torchrun"):
        launcher.run([])


def test_jobs_are_submitted_as_to_slurm(base: list[str], tmp_path: Path):
    where = ["hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.nproc=2"]
    settings = "hydra.launcher.settings={nodes: 1, timeout_min: 5}"
    process = sweep([*base, *where, settings, "train.steps=2", "param.rank=5"], 1, tmp_path)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    (ended,) = jobs_of(tmp_path / "runs" / "s").values()
    assert ended["status"] == "finished", output


def test_two_processes_search_alike_and_a_search_goes_on(base: list[str], tmp_path: Path):
    """Each process has a study of its own: with other proposals they would not agree on the configuration."""
    search = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.n_startup_trials=2", "train.steps=2"]
    space = ["optim.lr=tag(log,interval(1e-3,1e-2))", "param.rank=range(2,20,2)", "param.density=interval(0.01,0.1)"]
    runs = tmp_path / "runs" / "s"
    names = []
    for trials in (3, 4):
        process = sweep([*base, *search, *space, f"hydra.sweeper.n_trials={trials}"], 2, tmp_path)
        output, _ = process.communicate(timeout=400)
        assert process.returncode == 0, output
        names.append({path.parent.name for path in runs.glob("*/summary.json")})
        assert "best: eval_loss" in output
    assert len(names[0]) == 3 and names[0] < names[1] and len(names[1]) == 4
    assert output.count("finished before") == 6  # three lines and three rows of the table
