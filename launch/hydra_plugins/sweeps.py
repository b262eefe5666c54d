"""Sweepers and launchers for `launch/pretrain.py -m`. Hydra imports this folder by its name at every start, so slow
imports are inside functions. The implementation is in lrtrain/sweeps."""

import copy
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lrtrain.config.home import add_homes_of
from lrtrain.distributed.world import environment_rank, environment_world_size
from lrtrain.errors import ConfigError
from lrtrain.sweeps.jobs import Job, Outcome, outcome_without_start, plan_sweep
from lrtrain.sweeps.report import SweepFailed, Tell, print_outcomes, run_needed

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from lrtrain.sweeps.in_turn import InTurn
    from lrtrain.sweeps.search import Direction


# --- launchers: how jobs are run -----------------------------------------------------------------------------------


class PretrainLauncher(Launcher):
    """Base class of launchers: makes jobs from overrides; subclasses run them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.loader = config, hydra_context.config_loader
        common, hydra = copy.deepcopy(config), config.hydra
        with open_dict(common):
            common.pop("hydra")
        add_homes_of(hydra.runtime.config_sources)
        swept = [*(hydra.sweeper.get("params") or {})]
        self.sweep = plan_sweep(common, [*hydra.overrides.task], swept, hydra.job.config_name, composed_from(hydra))
        self.tell = Tell(self.sweep, speaks=environment_rank() == 0)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs; returns their outcomes as Hydra's return values."""
        jobs = [self.sweep.job(job, self.loader.load_sweep_config(self.config, [*job])) for job in job_overrides]
        outcomes = print_plans(jobs) if self.config.dry_run else self.run(jobs)
        return [
            JobReturn(overrides=job.arguments, cfg=job.composed, status=JobStatus.COMPLETED, _return_value=outcome)
            for job, outcome in zip(jobs, outcomes, strict=True)
        ]

    @abstractmethod
    def run(self, jobs: list[Job]) -> list[Outcome]:
        """Run the jobs that have no outcome yet."""

    def gather(self) -> None:  # noqa: B027
        """Wait for all processes: torchrun ends the others as soon as one of them exits with an error."""


def composed_from(hydra: DictConfig) -> list[str]:
    """The command-line options with which another process composes from the same files."""
    folders = {source.provider: source.path.removeprefix("file://") for source in hydra.runtime.config_sources}
    named = {"main": "--config-path", "command-line": "--config-dir"}
    searched = [one for one in hydra.overrides.hydra if one.startswith("hydra.searchpath")]
    options = [f"{option}={folders[provider]}" for provider, option in named.items() if provider in folders]
    return [f"--config-name={hydra.job.config_name}", *options, *searched]


class InTurnLauncher(PretrainLauncher):
    """Runs jobs one after another in the processes that torchrun started."""

    def run(self, jobs: list[Job]) -> list[Outcome]:
        return self.in_turn.run(jobs, self.tell)

    def gather(self) -> None:
        self.in_turn.control.leave()

    @cached_property
    def in_turn(self) -> "InTurn":
        """The runner, shared by all batches of a sweep."""
        from lrtrain.sweeps.in_turn import InTurn

        return InTurn()


class TorchrunLauncher(PretrainLauncher):
    """Runs each job with its own torchrun on this machine."""

    def __init__(self, nproc: int, parallel: int):
        self.nproc, self.parallel = nproc, parallel

    def run(self, jobs: list[Job]) -> list[Outcome]:
        from lrtrain.sweeps.processes import Torchruns

        refuse_torchrun("torchrun")
        torchruns = Torchruns(self.sweep.folder, self.nproc, self.parallel)
        found = [outcome_without_start(job, self.nproc) for job in jobs]
        return run_needed(jobs, found, lambda left: torchruns.run(left, self.tell), self.tell)


class SlurmLauncher(PretrainLauncher):
    """Runs each job as a Slurm job."""

    def __init__(self, cluster: str, nproc: int, wait: bool, settings: Mapping[str, Any]):
        self.cluster, self.nproc, self.wait, self.settings = cluster, nproc, wait, settings

    def run(self, jobs: list[Job]) -> list[Outcome]:
        from lrtrain.sweeps.slurm import Slurm

        refuse_torchrun("slurm")
        slurm = Slurm(self.sweep.folder, self.cluster, self.nproc, self.wait, {**self.settings})
        found = [outcome_without_start(job, self.nproc * self.settings["nodes"]) for job in jobs]
        return run_needed(jobs, found, lambda left: slurm.run(left, self.tell), self.tell)


def refuse_torchrun(launcher: str) -> None:
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"hydra/launcher={launcher} starts each job's processes itself: use python, not torchrun")


def print_plans(jobs: list[Job]) -> list[Outcome]:
    """Print the plan of each job, for `dry_run=true`."""
    from lrtrain.config.compose import typed
    from lrtrain.planning.budget import spend
    from lrtrain.planning.plan import print_plan

    for job in jobs:
        if environment_rank() == 0:
            print(job.name)
            print_plan(spend(typed(job.composed)), environment_world_size())
    return [Outcome(job.name, "not started") for job in jobs]


# --- sweepers: which jobs ------------------------------------------------------------------------------------------


class PretrainSweeper(Sweeper):
    """Base class of sweepers: runs jobs and reports on all of them at the end."""

    def __init__(self, params: Mapping[str, Any] | None = None):
        self.params = params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config  # validate_batch_is_legal reads them
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        assert isinstance(launcher, PretrainLauncher)
        self.jobs, self.parser = launcher, OverridesParser.create(config_loader=hydra_context.config_loader)
        self.dry_run = config.dry_run

    def sweep(self, arguments: list[str]) -> list[Outcome]:
        """Run all jobs and return their outcomes.

        Raises:
            SweepFailed: after all jobs, if one failed.
        """
        params = [f"{key}={value}" for key, value in self.params.items()]
        outcomes = self.search(self.parser.parse_overrides([*params, *arguments]))
        if not self.dry_run:
            if environment_rank() == 0:
                print_outcomes(self.jobs.sweep, outcomes)
            self.jobs.gather()
            if any(one.status == "failed" for one in outcomes):
                raise SweepFailed
        return outcomes

    @abstractmethod
    def search(self, overrides: list[Override]) -> list[Outcome]:
        """Choose jobs and run them."""

    def run(self, jobs: list[list[str]], done: int) -> list[Outcome]:
        """Run these jobs, after `done` others, and return their outcomes."""
        self.validate_batch_is_legal(jobs)  # finds typing errors before anything is run
        return [job.return_value for job in self.jobs.launch(jobs, initial_job_idx=done)]


class GridSweeper(PretrainSweeper):
    """All combinations of values."""

    def search(self, overrides: list[Override]) -> list[Outcome]:
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
        return self.run(jobs, 0)


class OptunaSweeper(PretrainSweeper):
    """Runs trials proposed by Optuna. Every process has its own study, and gets the same proposals."""

    def __init__(
        self,
        objectives: "Mapping[str, Direction]",
        n_trials: int,
        n_jobs: int,
        sampler: "BaseSampler",
        params: Mapping[str, Any] | None = None,
    ):
        super().__init__(params)
        self.objectives, self.n_trials, self.n_jobs, self.sampler = dict(objectives), n_trials, n_jobs, sampler

    def search(self, overrides: list[Override]) -> list[Outcome]:
        from lrtrain.sweeps.search import Search, refuse_nothing_held_out, refuse_unmeasured

        space = [override for override in overrides if override.is_sweep_override()]
        fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
        assert self.config is not None  # Hydra has set it up
        refuse_nothing_held_out(self.objectives, self.config)
        search = Search(space, self.objectives, self.sampler)
        outcomes: dict[str, Outcome] = {}  # by job, since the same job may be proposed again
        trials = 0
        while trials < self.n_trials and (self.dry_run or all(one.ended for one in outcomes.values())):
            proposals = search.ask(min(self.n_jobs, self.n_trials - trials))
            batch = self.run([[*fixed, *proposal] for proposal in proposals], trials)
            refuse_unmeasured(self.objectives, batch)
            search.tell(batch)
            outcomes |= {one.job: one for one in batch if one.job not in outcomes}
            trials += len(batch)
        if environment_rank() == 0 and not self.dry_run:
            search.report(self.jobs.sweep.folder)
        return [*outcomes.values()]
