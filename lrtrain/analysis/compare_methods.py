"""Comparing methods: every arm tunes its learning rate with the same sweep, then runs several seeds.

An arm is a list of overrides. Its sweep runs a grid of learning rates with the first seed; while the best one is at
an end of the grid, the grid grows by a factor of two there. The best is then run with the other seeds. Remaining runs
and reports are functions of the files of finished runs only, so a study can be stopped and resumed at any time.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from lrtrain.analysis.plots import load_run
from lrtrain.core.files import read_object
from lrtrain.plotting.style import HEADLINE, RUN_COLORS, STYLE

Results = Mapping[tuple[float, int], float]
"""(learning rate, seed) → evaluation perplexity of a finished run; infinite if it diverged."""


@dataclass(frozen=True)
class Study:
    """The arms of a study, its sweep, and the folder of its runs."""

    name: str
    common: list[str]  # overrides of all arms
    arms: dict[str, list[str]]
    lrs: list[float]
    extensions: int  # how often a grid may grow
    seeds: list[int]  # the first one also runs the sweep
    folder: Path


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    arm: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-lr{self.lr:g}-seed{self.seed}"


# What to run -----------------------------------------------------------------------------------------------


def sweep_grid(results: Results, study: Study) -> list[float]:
    """The learning rates of an arm's sweep, ascending: the study's grid, extended according to the results so far."""
    grid, seed = sorted(study.lrs), study.seeds[0]
    for _ in range(study.extensions):
        if any((lr, seed) not in results for lr in grid):
            break
        best = min(grid, key=lambda lr: results[lr, seed])  # the lowest of equal ones, and if all diverged
        if best == grid[0]:
            grid.insert(0, float(f"{best / 2:g}"))
        elif best == grid[-1]:
            grid.append(float(f"{best * 2:g}"))
        else:
            break
    return grid


def best_lr(results: Results, study: Study) -> float | None:
    """The best learning rate among the sweep's finished runs; None if all diverged, or none has finished."""
    finished = {lr: found for (lr, seed), found in results.items() if seed == study.seeds[0] and math.isfinite(found)}
    return min(finished, key=lambda lr: finished[lr]) if finished else None


def left_to_run(arm: str, results: Results, study: Study) -> list[Trial]:
    """The runs of an arm that can start now: missing runs of its sweep, or after it the best rate's other seeds."""
    wanted = [(lr, study.seeds[0]) for lr in sweep_grid(results, study)]
    best = best_lr(results, study)
    if best is not None and all(run in results for run in wanted):
        wanted = [(best, seed) for seed in study.seeds]
    return [Trial(arm, *run) for run in wanted if run not in results]


def runs_ahead(results: Results, study: Study) -> int:
    """The number of runs that an arm still needs if its grid does not grow further."""
    lacking = sum((lr, study.seeds[0]) not in results for lr in sweep_grid(results, study))
    return lacking + len(study.seeds) - 1 if lacking else len(left_to_run("", results, study))


# What has been run -----------------------------------------------------------------------------------------


def read_results(study: Study, arm: str) -> dict[tuple[float, int], float]:
    """The finished runs of an arm, from its run directories."""
    results: dict[tuple[float, int], float] = {}
    for folder in study.folder.glob(f"{arm}-lr*-seed*"):
        lr, seed = folder.name.removeprefix(f"{arm}-lr").split("-seed")
        if diverged_file(folder).exists():
            results[float(lr), int(seed)] = math.inf
        elif summary := read_object(folder / "summary.json"):
            found = summary["eval_perplexity"]
            if found is not None:  # a signal may have interrupted its evaluation
                results[float(lr), int(seed)] = found if math.isfinite(found) else math.inf
    return results


def diverged_file(run_dir: Path) -> Path:
    """The file that records that a run diverged."""
    return run_dir / "diverged"


@dataclass
class Outcome:
    """The results of an arm: its sweep, and its runs at the best learning rate."""

    arm: str
    sweep: dict[float, float]  # learning rate → perplexity with the first seed
    lr: float | None
    summaries: list[dict[str, Any]]  # at lr, one per seed
    curves: list[tuple[np.ndarray, np.ndarray]]  # tokens, evaluation loss
    diverged: list[str]
    complete: bool

    @property
    def perplexities(self) -> list[float]:
        return [summary["eval_perplexity"] for summary in self.summaries]

    def mean(self, key: str) -> float | None:
        """The mean of `key` over the summaries of all seeds; None if they do not have it."""
        values = [value for summary in self.summaries if (value := summary.get(key)) is not None]
        return fmean(values) if values else None

    @property
    def at_edge(self) -> bool:
        """Whether the best learning rate is at an end of the sweep."""
        return self.complete and len(self.sweep) > 1 and self.lr in (min(self.sweep), max(self.sweep))


def read_outcome(study: Study, arm: str) -> Outcome:
    """The outcome of an arm so far."""
    results = read_results(study, arm)
    lr = best_lr(results, study)
    seeds = [seed for seed in study.seeds if math.isfinite(results.get((lr, seed), math.inf))] if lr else []
    runs = [study.folder / Trial(arm, lr, seed).name for seed in seeds] if lr else []
    return Outcome(
        arm=arm,
        sweep={lr: found for (lr, seed), found in sorted(results.items()) if seed == study.seeds[0]},
        lr=lr,
        summaries=[json.loads((run / "summary.json").read_text()) for run in runs],
        curves=[load_run(run).curve("eval/loss")[1:] for run in runs],
        diverged=[f"{lr:g} (seed {seed})" for (lr, seed), found in sorted(results.items()) if math.isinf(found)],
        complete=not left_to_run(arm, results, study),
    )


# What to show ----------------------------------------------------------------------------------------------

COLUMNS = (
    *("arm", "parameters", "optimizer MiB", "best lr", "eval perplexity", "seeds"),
    *("tokens/s", "effective rank", "remarks"),
)


def table_rows(outcomes: list[Outcome]) -> list[tuple[str, ...]]:
    """One row of `COLUMNS` for each arm that has a finished run."""
    return [
        (
            outcome.arm,
            _parameters(outcome),
            _number(outcome.mean("optimizer_bytes"), ".1f", unit=2**20),
            f"{outcome.lr:g}" if outcome.lr else "-",
            mean_and_range(outcome.perplexities),
            str(len(outcome.summaries)),
            _number(outcome.mean("tokens_per_second"), ",.0f"),
            _number(outcome.mean("effective_rank"), ".1f"),
            "; ".join(_remarks(outcome)),
        )
        for outcome in outcomes
        if outcome.sweep
    ]


def mean_and_range(values: list[float]) -> str:
    """`33.1 (32.8–33.5)`"""
    return f"{fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "-"


def caption(study: Study, outcomes: list[Outcome]) -> str:
    """The caption of the table."""
    tokens = {summary["tokens"] for outcome in outcomes for summary in outcome.summaries}
    return (
        f"{study.name}: {' and '.join(f'{count:,}' for count in sorted(tokens))} tokens a run. Eval perplexity: mean "
        f"(lowest–highest) over the seeds, at each arm's own best learning rate, found with seed {study.seeds[0]} on a "
        f"grid from {min(study.lrs):g} to {max(study.lrs):g} that grows where the best one lies at its end. "
        "Tokens/s and effective rank (mean over matrices): mean over these runs. Parameters: stored / trainable, where "
        "these differ."
    )


def markdown(rows: list[tuple[str, ...]], text: str) -> str:
    """The table as Markdown, with its caption."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", text, ""])


def _parameters(outcome: Outcome) -> str:
    stored, trainable = outcome.mean("parameters"), outcome.mean("parameters_trainable")
    if stored is None:
        return "-"
    return f"{stored / 1e6:.2f} M" + (f" / {trainable / 1e6:.2f} M" if trainable not in (None, stored) else "")


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "-" if value is None else format(value / unit, form)


def _remarks(outcome: Outcome) -> list[str]:
    remarks = [] if outcome.complete else ["not finished"]
    if outcome.at_edge:
        remarks.append("best lr at the end of the grid")
    if outcome.diverged:
        remarks.append(f"diverged at lr {', '.join(outcome.diverged)}")
    if skipped := outcome.mean("skipped"):
        remarks.append(f"{skipped * len(outcome.summaries):.0f} steps skipped")
    return remarks


# Picture ---------------------------------------------------------------------------------------------------


def plot_outcomes(outcomes: list[Outcome], title: str, out: Path) -> Path:
    """Write to `out`: evaluation losses over tokens, mean and range over the seeds; perplexities of the sweeps."""
    outcomes = [outcome for outcome in outcomes if outcome.sweep]
    styles = arm_styles([outcome.arm for outcome in outcomes])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 6), layout="constrained")
        losses, sweeps = figure.subplots(1, 2)
        for outcome in outcomes:
            _draw_losses(losses, outcome, styles[outcome.arm])
            _draw_sweep(sweeps, outcome, styles[outcome.arm])
        losses.set_title("Evaluation loss at the best learning rate: mean and range over seeds")
        losses.set_xlabel("tokens")
        losses.set_ylabel("loss (nats per token)")
        losses.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens / 1e6:g}M"))
        figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=7)
        sweeps.set_title("Sweep: perplexity at the end (dot: the best, cross: diverged)")
        sweeps.set_xlabel("learning rate")
        sweeps.set_ylabel("evaluation perplexity")
        sweeps.set_xscale("log")
        sweeps.set_yscale("log")
        _plain_ticks(sweeps, sorted({lr for outcome in outcomes for lr in outcome.sweep}))
        figure.suptitle(title, **HEADLINE)
        figure.savefig(out, dpi=150)
    return out


def arm_styles(arms: list[str]) -> dict[str, dict[str, Any]]:
    """A color for each method; variants, named `method+variant`, have their method's color and dashed lines."""
    methods = {arm: arm.split("+")[0] for arm in arms}
    colors = dict(zip(dict.fromkeys(methods.values()), cycle(RUN_COLORS), strict=False))
    broken = {method: cycle(("--", ":", "-.")) for method in colors}
    return {
        arm: {"color": colors[method], "ls": next(broken[method]) if "+" in arm else "-"}
        for arm, method in methods.items()
    }


def _draw_losses(axes: Axes, outcome: Outcome, style: dict[str, Any]) -> None:
    shortest = min((len(losses) for _, losses in outcome.curves), default=0)
    if not shortest:
        return
    tokens = outcome.curves[0][0][:shortest]
    losses = np.stack([losses[:shortest] for _, losses in outcome.curves])  # (seeds, evaluations)
    axes.plot(tokens, losses.mean(0), lw=1.7, label=outcome.arm, **style)
    axes.fill_between(tokens, losses.min(0), losses.max(0), color=style["color"], alpha=0.15, lw=0)


def _draw_sweep(axes: Axes, outcome: Outcome, style: dict[str, Any]) -> None:
    finite = {lr: found for lr, found in outcome.sweep.items() if math.isfinite(found)}
    axes.plot([*finite], [*finite.values()], lw=1.5, label=outcome.arm, **style)
    if outcome.lr:
        axes.plot(outcome.lr, finite[outcome.lr], "o", ms=6, color=style["color"])
    for lr in outcome.sweep.keys() - finite.keys():
        axes.plot(lr, 0.97, "x", ms=7, color=style["color"], transform=axes.get_xaxis_transform())


def _plain_ticks(axes: Axes, lrs: list[float]) -> None:
    slant = {"rotation": 40, "ha": "right"} if len(lrs) > 8 else {}
    axes.set_xticks(lrs, [f"{lr:g}" for lr in lrs], **slant)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
