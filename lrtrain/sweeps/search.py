"""A search by Optuna: the search space in Hydra's grammar, proposals, and results."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import DictConfig
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from lrtrain.errors import ConfigError
from lrtrain.sweeps.jobs import Outcome

Direction = Literal["minimize", "maximize"]


class Search:
    """A study over the keys of `space`."""

    def __init__(self, space: Sequence[Override], objectives: Mapping[str, Direction], sampler: BaseSampler):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {override.get_key_element(): distribution(override) for override in space}
        self.objectives = [*objectives]
        self.study = optuna.create_study(directions=[*objectives.values()], sampler=sampler)
        self.jobs: dict[int, str] = {}
        self.asked: list[Trial] = []

    def ask(self, count: int) -> list[list[str]]:
        """Overrides of the next trials."""
        self.asked = [self.study.ask(self.space) for _ in range(count)]
        return [[f"{key}={value}" for key, value in trial.params.items()] for trial in self.asked]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Report the outcomes of the trials from `ask`."""
        for trial, outcome in zip(self.asked, outcomes, strict=True):
            self.jobs[trial.number] = outcome.job
            values = values_of(outcome.summary, self.objectives)
            self.study.tell(trial, values, state=None if values else TrialState.FAIL)

    def best(self) -> list[FrozenTrial]:
        """The Pareto-optimal trials, sorted by the first objective."""
        return sorted(self.study.best_trials, key=lambda trial: trial.values)

    def report(self, folder: Path) -> None:
        """Print the best trials, each job once."""
        for trial in {self.jobs[trial.number]: trial for trial in self.best()}.values():
            found = ", ".join(f"{key} {value:g}" for key, value in zip(self.objectives, trial.values, strict=True))
            print(f"best: {found}: {folder / self.jobs[trial.number]}", flush=True)


def distribution(override: Override) -> BaseDistribution:
    """`interval(1e-3,1e-2)`, `tag(log,interval(1e-3,1e-2))`, `range(8,64,8)` (64 not included), or a choice `a,b,c`."""
    sweep = override.value()
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        assert low is not None and high is not None
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log="log" in sweep.tags)
        return FloatDistribution(low, high, log="log" in sweep.tags)
    if isinstance(sweep, RangeSweep) and not sweep.shuffle:
        values = [*sweep.range()]
        if isinstance(sweep.step, int) and all(isinstance(value, int) for value in values):
            return IntDistribution(int(values[0]), int(values[-1]), step=sweep.step)
        return FloatDistribution(values[0], values[-1], step=sweep.step)
    return CategoricalDistribution([*override.sweep_string_iterator()])


def refuse_nothing_held_out(objectives: Iterable[str], composed: DictConfig) -> None:
    """Raise ConfigError if an objective needs held-out text, and the configuration has none."""
    asked = [key for key in objectives if key.startswith("eval_")]
    if asked and not composed.data.validation_fraction and not composed.data.source.get("validation"):
        raise ConfigError(
            f"hydra.sweeper.objectives asks for {asked[0]}, which data.validation_fraction=0 leaves without text; hold "
            f"some out, or choose another key of summary.json"
        )


def refuse_unmeasured(objectives: Iterable[str], outcomes: Sequence[Outcome]) -> None:
    """Raise ConfigError if a finished run has not measured an objective, since no other run would."""
    for one in outcomes:
        missing = [key for key in objectives if one.status == "finished" and one.summary.get(key) is None]
        if missing:
            known = ", ".join(key for key, value in one.summary.items() if isinstance(value, int | float))
            raise ConfigError(
                f"hydra.sweeper.objectives asks for {missing[0]}, which summary.json of {one.job} lacks; it has {known}"
            )


def values_of(summary: Mapping[str, Any], objectives: Sequence[str]) -> list[float] | None:
    """The objectives of a finished run; None if one of them is missing or not finite."""
    values = [math.nan if summary.get(key) is None else float(summary[key]) for key in objectives]
    return values if all(map(math.isfinite, values)) else None
