"""Jobs of a real Slurm whose time is up, and jobs with a mistake. All run side by side, as most of it is waiting."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_cluster
from launching import ROOT, TINY
from runs import gap, losses, run_jobs

pytestmark = pytest.mark.full

STEPS = 130  # more than the seconds before Slurm's signal: 90 to 120 with these times
TIME = ["--time=2", "--signal=USR2@1"]
SWEEP_TIME = ["hydra.launcher.settings.timeout_min=2", "+hydra.launcher.settings.slurm_signal_delay_s=1"]
SMALL = ["--cpus-per-task=1", "--gpus-per-node=1"]  # one process on each node
PATIENCE = 900  # seconds until all jobs have ended


@dataclass
class Ended:
    """What the jobs left in a folder, and what Slurm knows of each."""

    folder: Path
    jobs: dict[str, dict[str, str]]
    sweep: subprocess.CompletedProcess

    def log(self, job: str) -> str:
        return Path(self.jobs[job]["StdOut"]).read_text()


@pytest.fixture(scope="module")
def overrides(cache: Path, corpus: Path) -> list[str]:
    slow = ["schedule=constant", "schedule._target_=slow_schedule.slow_from_the_beginning"]
    return [*TINY, "param.execution=factored", f"data.path={corpus}", f"train.steps={STEPS}", *slow]


@pytest.fixture(scope="module")
def ended(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ended]:
    """All jobs, submitted together; the uninterrupted run is made meanwhile."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "launch").symlink_to(ROOT / "launch")
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "bare" / "launch").mkdir(parents=True)
    (folder / "bare" / "launch" / "slurm.sbatch").symlink_to(ROOT / "launch" / "slurm.sbatch")
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")), pytest.MonkeyPatch.context() as patch:
        for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
            patch.delenv(variable, raising=False)
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}{os.pathsep}{ROOT}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", without_torchrun(os.environ["PATH"]))
        script = [*SMALL, *TIME, "launch/slurm.sbatch", *overrides]
        numbers = {
            "run": slurm_cluster.submit(["--nodes=2", *script, "run.name=run"], folder),
            "typo": slurm_cluster.submit(["--nodes=1", *script, "param=sltran"], folder),
            "bare": slurm_cluster.submit(["--nodes=1", *script], folder / "bare"),
        }
        controller = sweep([*overrides, "param.rank=8", "run.name=s"], folder)
        try:
            run_jobs([[*overrides, f"run.dir={folder}/whole"]], 2, tmp_path_factory.mktemp("whole"))
            said, _ = controller.communicate(timeout=PATIENCE)
            jobs = {name: wait_for_end(number) for name, number in numbers.items()}
        finally:
            controller.kill()
        yield Ended(folder, jobs, subprocess.CompletedProcess(controller.args, controller.returncode, said))


def without_torchrun(path: str) -> str:
    return os.pathsep.join(one for one in path.split(os.pathsep) if not Path(one, "torchrun").exists())


def sweep(overrides: list[str], folder: Path) -> subprocess.Popen:
    """A sweep of one job, as a user starts it."""
    settings = ["nodes=1", "gpus_per_node=1", "cpus_per_task=1"]
    where = ["hydra/launcher=slurm", "hydra.launcher.nproc=1", *SWEEP_TIME]
    where += [f"hydra.launcher.settings.{one}" for one in settings]
    line = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "-m", *where, *overrides]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_end(number: str) -> dict[str, str]:
    """What Slurm knows of a job that has ended."""
    deadline = time.monotonic() + PATIENCE
    while (job := slurm_cluster.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
        assert time.monotonic() < deadline, job
        time.sleep(1)
    return job


def check_that_nothing_was_lost(said: str, run: Path, whole: Path, tolerance: float) -> None:
    """A log tells of stops (one, on a machine that is not busy) and of starts at the same steps, without a traceback;
    the losses are an uninterrupted run's."""
    stopped = re.findall(r"stopped by SIGUSR2 at step (\d+) of", said)
    assert stopped and 0 < int(stopped[-1]) < STEPS
    assert re.findall(r"going on from \S+ at step (\d+)", said) == stopped
    assert "Traceback" not in said
    assert gap(losses(run), losses(whole)) <= tolerance


def test_a_run_on_two_nodes_whose_time_is_up_is_saved_and_requeued_and_goes_on_as_if_uninterrupted(ended: Ended):
    job, said = ended.jobs["run"], ended.log("run")
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) > 0, said
    assert "not finished, ended with code 0; requeued" in said  # torchrun has waited for those that saved
    check_that_nothing_was_lost(said, ended.folder / "runs" / "run", ended.folder / "whole", 0)


@pytest.mark.parametrize("mistake, told", [("typo", "did you mean sltrain?"), ("bare", "torchrun is not on PATH")])
def test_a_mistake_is_not_requeued(mistake: str, told: str, ended: Ended):
    assert told in ended.log(mistake)
    assert (ended.jobs[mistake]["JobState"], ended.jobs[mistake]["Restarts"]) == ("FAILED", "0")


def test_a_job_of_a_sweep_whose_time_is_up_loses_nothing(ended: Ended):
    assert ended.sweep.returncode == 0, ended.sweep.stdout
    assert "finished" in ended.sweep.stdout and "Job step aborted" not in ended.sweep.stdout
    (run,) = (path.parent for path in (ended.folder / "runs" / "s").glob("*/summary.json"))
    said = "".join(path.read_text() for path in sorted((ended.folder / "runs" / "s" / "slurm").glob("*_log.*")))
    check_that_nothing_was_lost(said, run, ended.folder / "whole", 1e-4)  # which had two processes


def test_nothing_is_left_in_the_folder_that_jobs_were_submitted_from(ended: Ended):
    assert not [*ended.folder.rglob(".unfinished-*")]
