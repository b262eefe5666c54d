"""The commands of the pages on export, evaluation, compression and sweeps, as they stand there, on tiny runs."""

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from crew import Command
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from launching import ROOT, TINY
from runs import run_jobs

from lrtrain.config.compose import compose
from lrtrain.sweeps.jobs import quoted

pytestmark = pytest.mark.full

SMALLER = [override for override in TINY if not override.startswith("model")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache, corpus) -> Path:
    """Where the commands run: with the repository's folders, the two runs that they speak of, and a task of lm-eval."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("scripts", "launch", "docs"):
        (folder / name).symlink_to(ROOT / name)
    base = [*TINY, f"data.path={corpus}", "train.steps=2"]
    runs = {"llama_tiny-dense": ["param=dense", "param.rank=null"], "llama_tiny-sltrain": ["param=sltrain"]}
    run_jobs([[*base, *change, f"run.dir={folder}/runs/{name}"] for name, change in runs.items()], 1, folder)
    (folder / "tasks").mkdir()
    (folder / "tasks" / "mytask.jsonl").write_text(json.dumps({"question": "abc", "choices": ["d", "e"], "answer": 0}))
    (folder / "tasks" / "mytask.yaml").write_text(
        f"task: mytask\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/tasks/mytask.jsonl}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\nmetric_list: [{metric: acc}]\n'
    )
    return folder


def commands(page: str) -> list[list[str]]:
    """The indented command lines of a page, continued ones as one."""
    text = re.sub(r"\\\n *", "", (ROOT / "docs" / page).read_text())
    lines = re.findall(r"^    ((?:python|torchrun) .*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def run(command: list[str], corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the docs; trainings are made smaller, scripts run in this process."""
    if command[1] == "scripts/compress.py":
        sizes = [override for override in TINY if override.startswith("model.")]
        command = [*command, *sizes, "train.steps=2", "compress.sequences=16", "--ways", "lowrank, WeLore's ranks"]
    elif command[1] == "launch/pretrain.py":
        command = [*command, *SMALLER, f"data.path={corpus}", "train.steps=2"]
    if command[0] == "python" and command[1].startswith("scripts/"):
        monkeypatch.setattr(sys, "argv", command[1:])
        runpy.run_path(command[1], run_name="__main__")
        return
    start, rest = (command[1], command[2:]) if command[0] == "torchrun" else ("--nproc_per_node=1", command[1:])
    processes = int(start.removeprefix("--nproc_per_node="))
    done = Command(Path(rest[0]).resolve(), rest[1:], Path.cwd(), processes).result()
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", ["export.md", "evaluate.md", "compress.md"])
def test_the_commands_of_a_page_run(folder: Path, corpus: Path, page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(commands(page)) >= 3
    for command in commands(page):
        run(command, corpus, monkeypatch)
    if page == "compress.md":
        table = next((folder / "runs" / "llama_tiny-dense" / "compressed").glob("*/compress.md")).read_text()
        assert re.search(r"\| lowrank, WeLore's ranks \| [\d,]+ \| [\d.]+ \| [\d.]+ \|", table)


def test_compress_takes_over_where_the_text_of_the_run_lies(cache: Path):
    of_the_run = runpy.run_path(str(ROOT / "scripts" / "compress.py"))["of_the_run"]
    for path in ("it's here/*.txt", ["a b.txt", "it's here"]):
        config = compose(*SMALLER, f"data.path={quoted(path)}")
        assert compose(*of_the_run(config)).data.path == path


def test_the_sweeps_of_the_page_are_planned_and_its_comparisons_drawn(
    folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """Sweeps are trained in test_sweeps.py; here each line, as it stands, plans all of its jobs."""
    monkeypatch.chdir(folder)
    sweep = folder / "runs" / "llama_tiny-sltrain-by-rank"
    sweep.mkdir()
    for name, run_dir in {"a": "llama_tiny-dense", "b": "llama_tiny-sltrain"}.items():
        (folder / "runs" / name).symlink_to(folder / "runs" / run_dir)
        shutil.copytree(folder / "runs" / run_dir, sweep / name)
    sweeps = [command for command in commands("sweeps.md") if "launch/pretrain.py" in command]
    assert len(sweeps) >= 6
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # which the script sets: not for the tests that follow
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.delitem(Singleton._instances, Plugins, raising=False)  # a Hydra that knows no sweeper of ours
    for command in sweeps:
        overrides = command[command.index("launch/pretrain.py") + 1 :]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *overrides, "model=llama_tiny", "dry_run=true"])
        runpy.run_path("launch/pretrain.py", run_name="__main__")
        values = [override for override in overrides if "," in override and "(" not in override]
        jobs = max((len(value.split(",")) for value in values), default=1)
        assert capfd.readouterr().out.count("FLOPs per token") >= jobs, overrides
    for command in commands("sweeps.md"):
        if command[1] == "scripts/compare.py":
            run(command, corpus, monkeypatch)
    for out in (sweep / "comparison", folder / "comparison"):
        assert {"tradeoffs.png", "curves.png"} <= {path.name for path in out.iterdir()}
