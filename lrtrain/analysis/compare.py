"""A table of runs, and pictures of perplexity against cost, from the runs' files only."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from omegaconf import OmegaConf

from lrtrain.analysis.plots import load_run
from lrtrain.core.files import read_object
from lrtrain.measure.evaluate import perplexity
from lrtrain.plotting.style import HEADLINE, INK, RUN_COLORS, STYLE, compact_count


@dataclass(frozen=True)
class Row:
    """The row of a run; values that it has not measured are None."""

    run: str
    method: str
    rank: float | None
    """Mean over the layers."""
    parameters: int | None
    memory_gib: float | None
    """Peak of one process."""
    tokens_per_second: float | None
    eval_perplexity: float | None
    effective_rank: float | None
    tokens: int
    state: str
    """`finished`, or its progress."""

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among the paths, and those inside them (for sweeps)."""
    return [metrics.parent for path in paths for metrics in sorted(path.rglob("metrics.jsonl"))]


def read_row(run_dir: Path) -> Row:
    """The row of a run, from its summary, or from its last metrics if it has none yet."""
    config: Any = OmegaConf.load(run_dir / "config.yaml")
    run, summary = load_run(run_dir), read_object(run_dir / "summary.json") or {}
    step, tokens = (run.rows[-1][key] if run.rows else 0 for key in ("step", "tokens"))
    loss, rank = run.last("eval/loss"), summary.get("rank", config.param.rank)
    return Row(
        run=run_dir.resolve().name,
        method=config.param.name,
        rank=rank if isinstance(rank, int | float) else None,
        parameters=summary.get("parameters"),
        memory_gib=summary.get("memory_gib", run.last("perf/memory_gib")),
        tokens_per_second=summary.get("tokens_per_second", run.last("perf/tokens_per_second")),
        eval_perplexity=summary.get("eval_perplexity", None if loss is None else perplexity(loss)),
        effective_rank=summary.get("effective_rank", run.last("spectra/summary/all/erank_mean")),
        tokens=tokens,
        state="finished" if summary else f"at step {step:,} of {config.train.steps:,}",
    )


# The table ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    "run": "{}",
    "method": "{}",
    "rank": "{:g}",
    "parameters": "{:,}",
    "memory_gib": "{:.2f}",
    "tokens_per_second": "{:,.0f}",
    "eval_perplexity": "{:.2f}",
    "effective_rank": "{:.1f}",
    "tokens": "{:,}",
    "state": "{}",
}


def cells(row: Row) -> list[str]:
    """The formatted cells of a row."""
    return ["-" if (value := getattr(row, key)) is None else form.format(value) for key, form in COLUMNS.items()]


def headings() -> list[str]:
    return [key.replace("_gib", ", GiB").replace("tokens_per_second", "tokens/s").replace("_", " ") for key in COLUMNS]


def write_tables(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write `comparison.md` (formatted) and `comparison.csv` (all digits)."""
    lines = [headings(), ["---"] * len(COLUMNS), *map(cells, rows)]
    markdown, table = folder / "comparison.md", folder / "comparison.csv"
    markdown.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS])
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)
    return [markdown, table]


# What it costs and what it gives -----------------------------------------------------------------------------------


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points (both coordinates minimized), sorted by the first coordinate."""
    front: list[int] = []
    for place in sorted(range(len(points)), key=lambda place: points[place]):
        if not front or points[place][1] < points[front[-1]][1]:
            front.append(place)
    return front


def plot_tradeoffs(rows: Sequence[Row], title: str, out: Path) -> Path:
    """Write to `out`: perplexity against parameters, memory and rank."""
    colors = dict(zip(dict.fromkeys(row.method for row in rows), cycle(RUN_COLORS), strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 5.6), layout="constrained")
        parameters, memory, ranks = figure.subplots(1, 3, sharey=True)
        _draw_front(parameters, rows, "parameters", colors)
        _draw_front(memory, rows, "memory_gib", colors)
        _draw_ranks(ranks, rows, colors)
        parameters.set(title="Perplexity against parameters", xlabel="parameters", ylabel="evaluation perplexity")
        parameters.xaxis.set_major_formatter(FuncFormatter(lambda count, _: compact_count(count)))
        memory.set(title="… against peak memory", xlabel="GiB per process")
        ranks.set(title="… against rank", xlabel="rank, mean over the layers")
        if judged := [row.eval_perplexity for row in rows if row.eval_perplexity and comparable(row, rows)]:
            parameters.set_ylim(0.93 * min(judged), 1.12 * max(judged))  # a run that has just started would stretch it
        if any(row.eval_perplexity for row in rows):
            parameters.set_yscale("log")
            parameters.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            parameters.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            parameters.yaxis.set_minor_formatter(NullFormatter())
        handles = [Line2D([], [], ls="", marker="o", color=color, label=method) for method, color in colors.items()]
        handles.append(Line2D([], [], color=INK, lw=1, ls=":", label="Pareto front of the finished runs"))
        if any(not comparable(row, rows) for row in rows):
            handles.append(Line2D([], [], ls="", marker="o", mfc="w", mec=INK, label="unfinished, or fewer tokens"))
        figure.legend(handles=handles, loc="outside lower center", ncols=8)
        figure.suptitle(title, **HEADLINE)
        figure.savefig(out, dpi=150)
    return out


def comparable(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a run has finished with as many tokens as the longest finished run."""
    return row.finished and row.tokens == max(other.tokens for other in rows if other.finished)


def _draw_front(axes: Axes, rows: Sequence[Row], key: str, colors: dict[str, str]) -> None:
    """Perplexity over the value of `key`, with the labelled Pareto front of comparable runs."""
    shown = [row for row in rows if row.eval_perplexity is not None and getattr(row, key) is not None]
    for row in shown:
        _draw_point(axes, getattr(row, key), row, rows, colors[row.method])
    judged = [row for row in shown if comparable(row, rows)]
    points = [(float(getattr(row, key)), row.eval_perplexity or 0.0) for row in judged]
    front = pareto(points)
    axes.plot([points[i][0] for i in front], [points[i][1] for i in front], color=INK, lw=1, ls=":", zorder=1)
    for place in front[:8]:
        axes.annotate(label(judged[place]), points[place], (6, 5), textcoords="offset points", fontsize=8, color=INK)
    axes.margins(x=0.25, y=0.15)


def _draw_ranks(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> None:
    """Perplexity over rank, with a line through the best run at each rank of a method; methods without a rank as
    horizontal lines."""
    for method, color in colors.items():
        ours = [row for row in rows if row.method == method and row.eval_perplexity is not None]
        best: dict[float, float] = {}
        for row in ours:
            if row.rank is None:
                axes.axhline(row.eval_perplexity or 0, color=color, lw=1, ls="--")
            else:
                _draw_point(axes, row.rank, row, rows, color)
                if comparable(row, rows):
                    best[row.rank] = min(best.get(row.rank, float("inf")), row.eval_perplexity or 0)
        axes.plot(sorted(best), [best[rank] for rank in sorted(best)], color=color, lw=1.4, zorder=1)
    axes.margins(0.15)


def _draw_point(axes: Axes, x: float, row: Row, rows: Sequence[Row], color: str) -> None:
    face = color if comparable(row, rows) else "w"
    axes.plot(x, row.eval_perplexity or 0, "o", ms=7, mec=color, mfc=face, mew=1.5)


def label(row: Row) -> str:
    return row.method if row.rank is None else f"{row.method} {row.rank:g}"
