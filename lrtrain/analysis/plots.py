"""Pictures of runs from their files only: losses, singular values, effective ranks.

Drawn without pyplot, so that a training process does not change matplotlib's global state."""

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from lrtrain.core.names import depth_of, projection_of
from lrtrain.plotting.style import (
    ACCENT,
    CAPTION,
    FAINT,
    HEADLINE,
    INK,
    MUTED,
    PROJECTION_COLORS,
    STYLE,
    _tint,
    compact_count,
    run_colors,
)
from lrtrain.tracking.jsonl import Row, read_metrics
from lrtrain.tracking.spectra_files import load_spectra, spectra_steps

LOSS_NAMES = {"eval/loss": "Evaluation loss", "train/loss": "Training loss"}


@dataclass
class Run:
    """The data of one run for the pictures."""

    name: str
    rows: list[Row]
    spectra: dict[int, dict[str, np.ndarray]]  # at the first, middle and last measured step

    def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, tokens and values where the metric was logged and finite."""
        rows = [row for row in self.rows if row["metrics"].get(metric) is not None]
        columns = [[row["step"] for row in rows], [row["tokens"] for row in rows]]
        values = [row["metrics"][metric] for row in rows]
        return np.array(columns[0]), np.array(columns[1]), np.array(values, dtype=float)

    def last(self, metric: str) -> float | None:
        values = self.curve(metric)[2]
        return float(values[-1]) if len(values) else None

    @property
    def projections(self) -> list[str]:
        """The projections, in the order of the model."""
        layers = self.spectra[max(self.spectra)] if self.spectra else {}
        return list(dict.fromkeys(map(projection_of, layers)))


def load_run(run_dir: Path) -> Run:
    rows = read_metrics(run_dir / "metrics.jsonl")
    last = max((row["step"] for row in rows), default=0)
    steps = [step for step in spectra_steps(run_dir) if step <= last]  # later ones were undone by a resume
    shown = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    spectra = {step: found for step in shown if (found := load_spectra(run_dir, step))}  # empty if all are estimated
    return Run(run_dir.resolve().name, rows, spectra)


def plot_run(run_dir: Path) -> Path:
    """Write `<run_dir>/plots/summary.png`: loss, effective ranks and singular values of one run."""
    run = load_run(run_dir)
    out = run_dir / "plots" / "summary.png"
    out.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure, top, bottom = _page(bool(run.spectra))
        if bottom is None:
            _draw_loss(top.subplots(), run)
        else:
            loss, ranks, heat = top.subplots(1, 3, width_ratios=[1.15, 1.15, 1])
            _draw_loss(loss, run)
            _draw_ranks(ranks, run)
            _draw_heatmap(heat, run)
            _draw_snapshots(bottom, run)
        figure.suptitle(_headline(run), **HEADLINE)
        figure.savefig(out, dpi=150)
    return out


def plot_runs(run_dirs: list[Path], out: Path) -> Path:
    """Write to `out` a comparison of several runs: losses, mean effective ranks and final singular values."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    colors = dict(zip((run.name for run in runs), run_colors(len(runs)), strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure, top, bottom = _page(any(run.spectra for run in runs))
        curves, finals, *ranks = top.subplots(1, 2 if bottom is None else 3)
        _compare_losses(curves, runs, colors)
        _compare_final_losses(finals, runs, colors)
        if bottom is not None:
            _compare_ranks(ranks[0], runs, colors)
            _compare_spectra(bottom, runs, colors)
        figure.suptitle(f"{len(runs)} runs compared", **HEADLINE)
        figure.savefig(out, dpi=150)
    return out


def _draw_loss(axes: Axes, run: Run) -> None:
    _, tokens, losses = run.curve("train/loss")
    axes.plot(tokens, losses, color=MUTED, lw=1.2, label="training")
    _, tokens, losses = run.curve("eval/loss")
    if len(losses):
        axes.plot(tokens, losses, color=ACCENT, lw=1.8, marker="o", ms=4, label="evaluation")
    loss = _common_loss([run])
    final = run.last(loss)
    axes.set_title("No loss was logged" if final is None else f"{LOSS_NAMES[loss]} {final:.3f} at the end")
    _tokens_axis(axes)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right")


def _draw_ranks(axes: Axes, run: Run) -> None:
    for projection, color in _projection_colors(run).items():
        steps, _, shares = run.curve(f"spectra/summary/{projection}/erank_rel_mean")
        axes.plot(steps, shares, color=color, lw=1.8, marker="o", ms=2.5, label=projection)
    shares = run.curve("spectra/summary/all/erank_rel_mean")[2]
    axes.set_title(_movement(shares) if len(shares) else "All measured matrices were zero or not finite")
    axes.set_xlabel("step")
    axes.set_ylabel("effective rank / possible rank")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(shares):
        axes.legend(ncols=2, loc="best", columnspacing=1.2, handlelength=1.4)


def _draw_heatmap(axes: Axes, run: Run) -> None:
    layers = list(run.spectra[max(run.spectra)]) if run.spectra else []
    depths = sorted({depth for layer in layers if (depth := depth_of(layer)) is not None})
    projections = list(dict.fromkeys(projection_of(layer) for layer in layers if depth_of(layer) is not None))
    table = np.full((len(projections), len(depths)), np.nan)
    for layer in layers:
        share, depth = run.last(f"spectra/{layer}/erank_rel"), depth_of(layer)
        if share is not None and depth is not None:
            table[projections.index(projection_of(layer)), depths.index(depth)] = 100 * share
    axes.grid(False)
    axes.set_title("Final effective rank, % of the possible")
    if np.isnan(table).all():
        axes.set_axis_off()
        return
    image = axes.imshow(table, cmap="YlGnBu_r", aspect="auto")
    axes.set_xticks(range(len(depths)), map(str, depths))
    axes.set_yticks(range(len(projections)), projections)
    axes.set_xlabel("depth")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(depths) <= 16:
        _write_cells(axes, table, image)


def _write_cells(axes: Axes, table: np.ndarray, image) -> None:
    for (row, column), value in np.ndenumerate(table):
        if np.isfinite(value):
            dark = np.dot(image.cmap(image.norm(value))[:3], (0.299, 0.587, 0.114)) < 0.55
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="w" if dark else INK)


def _draw_snapshots(figure: SubFigure, run: Run) -> None:
    """σ over index, one panel per projection: the median over layers, later steps darker."""
    strengths = np.linspace(0.35, 1, len(run.spectra))
    colors = _projection_colors(run)
    panels = _panels(figure, len(colors))
    for axes, (projection, color) in zip(panels, colors.items(), strict=True):
        for strength, (step, spectra) in zip(strengths, run.spectra.items(), strict=True):
            sigma = _layers_of(spectra, projection)
            _draw_median(axes, sigma, _tint(color, strength), f"step {step:,}")
        _draw_range(axes, _layers_of(run.spectra[max(run.spectra)], projection), color)
        axes.set_title(projection, color=color)
    _same_log_axis(panels)
    if panels[0].lines:
        panels[0].legend(loc="lower left", handlelength=1.2)
    figure.suptitle("Singular values: median over the layers, with the range of all layers at the last step", **CAPTION)


def _headline(run: Run) -> str:
    if not run.rows:
        return run.name
    return f"{run.name}: {run.rows[-1]['step']:,} steps, {compact_count(run.rows[-1]['tokens'])} tokens"


def _movement(shares: np.ndarray) -> str:
    first, last = shares[0], shares[-1]
    if abs(last - first) < 0.005:
        return f"Effective rank stays at {last:.0%} of the possible"
    verb = "rises" if last > first else "falls"
    return f"Effective rank {verb} from {first:.0%} to {last:.0%} of the possible"


def _projection_colors(run: Run) -> dict[str, str]:
    return dict(zip(run.projections, cycle(PROJECTION_COLORS), strict=False))


def _compare_losses(axes: Axes, runs: list[Run], colors: dict[str, str]) -> None:
    """Draw loss curves; the final losses next to them are the legend."""
    loss = _common_loss(runs)
    if all(len(run.curve(loss)[2]) < 2 for run in runs):  # a single evaluation at the end is not a curve
        loss = "train/loss"
    for run in runs:
        _, tokens, losses = run.curve(loss)
        axes.plot(tokens, losses, color=colors[run.name], lw=1.6)
    axes.set_title(LOSS_NAMES[loss])
    _tokens_axis(axes)
    axes.set_ylabel("loss (nats per token)")


def _compare_final_losses(axes: Axes, runs: list[Run], colors: dict[str, str]) -> None:
    loss = _common_loss(runs)
    finals = sorted(((final, run.name) for run in runs if (final := run.last(loss)) is not None), reverse=True)
    if not finals:
        axes.set_axis_off()
        return
    for place, (final, name) in enumerate(finals):
        axes.plot(final, place, "o", ms=9, color=colors[name])
        axes.annotate(f"{final:.3f}", (final, place), (9, -3.5), textcoords="offset points", color=INK)
    axes.set_yticks(range(len(finals)), [name for _, name in finals])
    axes.set_ylim(-0.8, len(finals) - 0.2)
    axes.margins(x=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(f"{finals[-1][1]} ends lowest")
    axes.set_xlabel(f"final {LOSS_NAMES[loss].lower()}")


def _compare_ranks(axes: Axes, runs: list[Run], colors: dict[str, str]) -> None:
    for run in runs:
        steps, _, ranks = run.curve("spectra/summary/all/erank_mean")
        axes.plot(steps, ranks, color=colors[run.name], lw=1.8, marker="o", ms=2.5)
    axes.set_title("Mean effective rank of all layers")
    axes.set_xlabel("step")
    axes.set_ylabel("effective rank")
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _compare_spectra(figure: SubFigure, runs: list[Run], colors: dict[str, str]) -> None:
    projections = list(dict.fromkeys(projection for run in runs for projection in run.projections))
    panels = _panels(figure, len(projections))
    for axes, projection in zip(panels, projections, strict=True):
        for run in runs:
            if projection in run.projections:
                sigma = _layers_of(run.spectra[max(run.spectra)], projection)
                _draw_median(axes, sigma, colors[run.name], run.name)
        axes.set_title(projection)
    _same_log_axis(panels)
    figure.suptitle("Singular values at the last measured step, median over the layers", **CAPTION)


def _common_loss(runs: list[Run]) -> str:
    """The loss that all runs have: evaluation loss, or else training loss."""
    return "eval/loss" if all(run.last("eval/loss") is not None for run in runs) else "train/loss"


def _page(with_spectra: bool) -> tuple[Figure, SubFigure, SubFigure | None]:
    if not with_spectra:
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        return figure, figure.add_subfigure(figure.add_gridspec(1, 1)[0]), None
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=[1.2, 1])
    return figure, figure.add_subfigure(rows[0]), figure.add_subfigure(rows[1])


def _panels(figure: SubFigure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _layers_of(spectra: dict[str, np.ndarray], projection: str) -> np.ndarray:
    """σ of the projection's layers (layers, longest); NaN for zeros and beyond a shorter spectrum."""
    layers = [sigma for layer, sigma in spectra.items() if projection_of(layer) == projection]
    table = np.full((len(layers), max(map(len, layers), default=0)), np.nan)
    for row, sigma in zip(table, layers, strict=True):
        row[: len(sigma)] = np.where(sigma > FAINT * sigma[0], sigma, np.nan)
    return table


def _draw_median(axes: Axes, sigma: np.ndarray, color, label: str) -> None:
    present = ~np.isnan(sigma).all(axis=0)
    if present.any():
        index = 1 + np.flatnonzero(present)
        axes.plot(index, np.nanmedian(sigma[:, present], axis=0), color=color, lw=1.7, label=label)


def _draw_range(axes: Axes, sigma: np.ndarray, color: str) -> None:
    present = ~np.isnan(sigma).all(axis=0)
    index = 1 + np.flatnonzero(present)
    low, high = np.nanmin(sigma[:, present], axis=0), np.nanmax(sigma[:, present], axis=0)
    axes.fill_between(index, low, high, color=color, alpha=0.13, lw=0)


def _same_log_axis(panels: list[Axes]) -> None:
    if any(axes.lines for axes in panels):  # a logarithmic axis needs a point above zero
        panels[0].set_yscale("log")
    panels[0].set_ylabel("singular value σ")
    for axes in panels:
        axes.set_xlabel("index")
        axes.tick_params(which="minor", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))


def _tokens_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: compact_count(tokens)))
