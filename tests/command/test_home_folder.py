"""What `lrtrain init` lays down, used as its README says, from a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from crew import Command
from launching import ROOT

from lrtrain.command.init import init
from lrtrain.errors import ConfigError
from lrtrain.tracking.jsonl import series

FROM_IT = ["--config-dir=conf", "--config-name=mine"]
PRETRAIN = "launch/pretrain.py"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    init(folder)
    return folder


@pytest.fixture
def run(home: Path, tiny: list[str]):
    """Train in the home's folder; returns what was said."""

    def train(*words: str, processes: int = 1, options=FROM_IT) -> str:
        overrides = [*tiny, "callbacks.conditioning.every=2", *words]
        return ended(Command(ROOT / PRETRAIN, [*options, *overrides], home, processes, merged=True))

    return train


def ended(command: Command) -> str:
    """What a command said, which has to end well."""
    said, _ = command.communicate(timeout=400)
    assert command.returncode == 0, said
    return said


def script(home: Path, name: str, *words: str) -> str:
    return ended(Command(ROOT / "scripts" / f"{name}.py", [*words], home, merged=True))


def losses(folder: Path) -> list[float]:
    return [*series(folder / "metrics.jsonl", "train/loss")[1]]


def test_a_folder_that_is_there_is_refused(home: Path):
    with pytest.raises(ConfigError, match="mine exists; give a new folder"):
        init(home)


def test_it_comes_with_no_leftovers(home: Path):
    assert {path.name for path in home.iterdir()} == {"README.md", "callbacks", "conf", "layers", "pytest.ini", "tests"}
    assert not [*home.rglob("__pycache__")]


@pytest.mark.full
def test_its_own_test_passes(home: Path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.full
def test_it_trains_resumes_evaluates_exports_and_starts_others(home: Path, run):
    run("run.name=whole", "train.steps=4", "schedule=constant", processes=2)
    run("run.name=first", "train.steps=2", "schedule=constant", processes=2)
    (home / "layers" / "gated.py").open("a").write("# changed\n")
    said = run("run.name=first", "train.steps=4", "schedule=constant", "resume=auto", processes=2)
    assert said.count("modules that changed since step 2: layers.gated\n") == 1
    first = home / "runs" / "first"
    assert losses(first) == losses(home / "runs" / "whole") and len(losses(first)) == 4
    assert len(series(first / "metrics.jsonl", "conditioning/largest")[0]) > 1
    kept = json.loads((first / "checkpoints" / "step-00000004" / "meta.json").read_text())["home"]
    assert kept == json.loads((first / "run.json").read_text())["home"]
    assert kept["folders"] == [str(home / "conf")] and kept["import_path"] == [str(home)]
    assert [*kept["modules"]] == ["callbacks.conditioning", "layers.gated"]

    assert "perplexity" in script(home, "evaluate", "runs/first", "--config-dir=conf")
    for form in ("hf-dense", "hf-factorized"):
        script(home, "export", "runs/first", "--to", form, "--config-dir", "conf")
    assert "perplexity" in script(home, "evaluate", "runs/first/export/hf-factorized", "-cd", "conf", *DATA(home))
    script(home, "generate", "runs/first", "--tokens=3", "--config-dir=conf")
    run("param=lowrank", "init_from=runs/first", "train.steps=1", "run.name=healed")
    assert "first" in script(home, "compare", "runs/first", "runs/healed")


def DATA(home: Path) -> list[str]:
    return ["data=local", f"data.path={home / 'README.md'}", "data.validation_fraction=0", "data.seq_len=32"]


@pytest.mark.full
def test_without_its_folder_none_of_its_code_is_run_and_a_sentence_says_what_to_give(home: Path, run):
    run("run.name=first", "train.steps=1")
    for module in ("layers/gated.py", "callbacks/conditioning.py"):
        (home / module).write_text("raise SystemExit('this was run')")
    for name, *words in (["evaluate"], ["generate"], ["export", "--to", "hf-dense"]):
        refused = Command(ROOT / "scripts" / f"{name}.py", ["runs/first", *words], home, merged=True)
        said, _ = refused.communicate()
        assert refused.returncode == 1 and f"its folder, --config-dir={home / 'conf'}, or itself" in said, said
        assert "this was run" not in said


@pytest.mark.full
def test_it_is_planned_and_simulated(home: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    small = [*tiny, "gpus=2"]
    assert "gated" in script(home, "plan", *FROM_IT, *small)
    assert "gated" in script(home, "simulate", *FROM_IT, *small, "picture=none")
    monkeypatch.setenv("LRTRAIN_CONF", str(home))
    assert "gated" in script(home, "plan", "param=gated", *small)


LAUNCHERS = {
    "in_turn": [],
    "torchrun": ["hydra.launcher.nproc=1"],
    "slurm": ["hydra.launcher.cluster=local", "hydra.launcher.nproc=1", "hydra.launcher.settings={timeout_min: 5}"],
}


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_its_sweeps_run_by_every_launcher(launcher: str, home: Path, run, monkeypatch: pytest.MonkeyPatch):
    """The folder is named by the environment, relative to where the sweep starts."""
    monkeypatch.setenv("LRTRAIN_CONF", ".")
    where = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    run(*where, "train.steps=1", "run.name=s", "param.rank=4,5", options=["-m", "--config-name=mine"])
    summaries = [*(home / "runs" / "s").glob("*/summary.json")]
    assert len(summaries) == 2
    for summary in summaries:
        assert json.loads((summary.parent / "run.json").read_text())["home"]["import_path"] == [str(home)]


@pytest.mark.full
def test_a_search_names_its_jobs_by_the_configuration_too(home: Path, run):
    (home / "conf" / "other.yaml").write_text("defaults: [mine, _self_]")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "train.steps=1", "run.name=s"]
    for name in ("mine", "other"):
        run(*search, "param.rank=range(4,6)", options=["-m", "--config-dir=conf", f"--config-name={name}"])
    names = {path.parent.name for path in (home / "runs" / "s").glob("*/summary.json")}
    assert len(names) == 2 and len({name.partition("-")[0] for name in names}) == 1, names
