"""Pictures of spectra from the files of runs, with a row for each run, and an HTML report with all of them."""

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lrtrain.analysis.plots import Run, load_run
from lrtrain.core.names import depth_of, projection_of
from lrtrain.plotting.style import FAINT, HEADLINE, INK, PROJECTION_COLORS, STYLE
from lrtrain.tracking.spectra_files import load_parts, load_spectra, spectra_steps

MOST_LINES = 7  # of the measured steps, that are drawn
STEPS = colormaps["viridis"]


@dataclass(frozen=True)
class Picture:
    """A figure and its caption."""

    name: str
    caption: str
    png: bytes


def spectral_pictures(run_dirs: list[Path]) -> list[Picture]:
    """All pictures for which the runs have data."""
    runs = [Measured(run_dir) for run_dir in run_dirs]
    drawn = [
        (
            "spectra",
            "Singular values over their index, median over the layers of a projection; one line per measured step.",
            grid(runs, lambda run: run.projections, draw_spectra, "singular value", sharey=True),
        ),
        (
            "effective-rank",
            "Effective rank exp(−Σ p ln p), p = σ/Σσ, of each matrix: depth over steps (measurements).",
            grid(runs, lambda run: run.projections, draw_history, "depth", sharey="row"),
        ),
        (
            "rank-over-depth",
            "Effective rank over depth, at the first measurement that has one (broken) and at the last.",
            grid(runs, lambda run: [""], draw_depths, "effective rank", sharey=True, wide=True),
        ),
        (
            "head-and-tail",
            "Share of L in the leading r singular values and of S in the others, mean over the layers; dotted: null, "
            "with the entries of S at random positions. Only the distance from the null is meaningful.",
            grid([run for run in runs if run.has("head_share")], lambda run: run.projections, draw_shares, "share"),
        ),
        (
            "contributions",
            "What L (blue) and S (orange) contribute to the singular values at the last measurement, u_iᵀLv_i and "
            "u_iᵀSv_i in σ_1, mean over the layers and over neighbouring values; line: L's with the entries of S put "
            "elsewhere at random.",
            grid(
                [run for run in runs if run.parts],
                lambda run: run.split_projections,
                draw_parts,
                "share of σ_1",
                sharey=True,
            ),
        ),
        (
            "hidden-states",
            "Hidden states after each block: RankMe (raw and centred), matrix nuclear norm, matrix entropy; or the "
            "shares of their energy along the leading direction and along the mean.",
            grid([run for run in runs if run.hidden], lambda run: run.hidden, draw_hidden, ""),
        ),
    ]
    return [Picture(name, caption, figure) for name, caption, figure in drawn if figure is not None]


HIDDEN = ("rankme", "rankme_centered", "mnn", "matent", "top_share", "mean_share")
BARS = 24


class Measured:
    """A run's measurements of spectra."""

    def __init__(self, run_dir: Path):
        self.run: Run = load_run(run_dir)
        self.steps = [step for step in spectra_steps(run_dir) if step <= max(row["step"] for row in self.run.rows)]
        chosen = np.unique(np.linspace(0, len(self.steps) - 1, MOST_LINES).round().astype(int))
        self.shown = {self.steps[i]: load_spectra(run_dir, self.steps[i]) for i in chosen}
        self.projections = self.run.projections
        self.parts = load_parts(run_dir, self.steps[-1]) if self.steps else {}

    @property
    def hidden(self) -> list[str]:
        """The metrics of hidden states that were measured."""
        return [metric for metric in HIDDEN if self.of(f"hidden/{metric}/")]

    @property
    def split_projections(self) -> list[str]:
        """The projections whose parts were measured."""
        return list(dict.fromkeys(map(projection_of, self.parts)))

    def of(self, start: str) -> dict[int, dict[str, float]]:
        """Step → name without prefix → value, for all metrics with the prefix `start`."""
        found = {
            row["step"]: {
                name.removeprefix(start): value
                for name, value in row["metrics"].items()
                if name.startswith(start) and value is not None
            }
            for row in self.run.rows
        }
        return {step: values for step, values in found.items() if values}

    def has(self, metric: str) -> bool:
        return any(name.endswith(f"/{metric}_mean") for found in self.of("spectra/summary/").values() for name in found)

    def eranks(self) -> dict[int, dict[tuple[str, int], float]]:
        """Step → (projection, depth) → effective rank."""
        found: dict[int, dict[tuple[str, int], float]] = {}
        for step, values in self.of("spectra/").items():
            for name, value in values.items():
                layer, _, metric = name.rpartition("/")
                if metric in ("erank", "erank_estimated") and (depth := depth_of(layer)) is not None:
                    found.setdefault(step, {})[projection_of(layer), depth] = value
        return found


Draw = Callable[[Axes, Measured, str], None]


def grid(
    runs: list[Measured],
    columns: Callable[[Measured], list[str]],
    draw: Draw,
    label: str,
    sharey: bool | str = False,
    wide: bool = False,
) -> bytes | None:
    """A PNG with a row for each run and a column for each name in `columns`; None if there are none."""
    names = list(dict.fromkeys(name for run in runs for name in columns(run)))
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        size = (9.0 if wide else max(2.3 * len(names) + 1, 7), 2.9 * len(runs) + (0.9 if wide else 0.5))
        figure = Figure(figsize=size, layout="constrained")
        rows = figure.subfigures(len(runs), 1, squeeze=False)[:, 0]
        first: Axes | None = None
        for row, run in zip(rows, runs, strict=True):
            row.suptitle(run.run.name, **(HEADLINE | {"fontsize": 11}))
            panels = row.subplots(1, len(names), squeeze=False, sharey=sharey is not False)[0]
            for axes, name in zip(panels, names, strict=True):
                axes.set_title(name)
                if name in columns(run):
                    draw(axes, run, name)
                else:
                    axes.set_axis_off()
            panels[0].set_ylabel(label)
            if sharey is True:
                first = first or panels[0]
                if panels[0] is not first:
                    panels[0].sharey(first)
        file = io.BytesIO()
        figure.savefig(file, dpi=130, format="png")
    return file.getvalue()


def draw_spectra(axes: Axes, run: Measured, projection: str) -> None:
    last = max(run.steps)
    for step, spectra in run.shown.items():
        of_layers = [sigma for layer, sigma in spectra.items() if projection_of(layer) == projection]
        sigma = np.median(cut_to_shortest(of_layers), axis=0)
        visible = np.where(sigma > FAINT * sigma[0], sigma, np.nan)
        if sigma[0] > 0:
            axes.plot(
                np.arange(1, len(sigma) + 1), visible, color=STEPS(0.92 * step / last), label=f"step {step:,}", lw=1.3
            )
    axes.set_yscale("log")
    axes.set_xlabel("index")
    if projection == run.projections[-1]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def cut_to_shortest(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays as rows, truncated to the shortest one."""
    return np.stack([array[: min(map(len, arrays))] for array in arrays])


def draw_history(axes: Axes, run: Measured, projection: str) -> None:
    eranks = run.eranks()
    depths = sorted({depth for found in eranks.values() for _, depth in found})
    cells = [[found.get((projection, depth), np.nan) for found in eranks.values()] for depth in depths]
    everything = [value for found in eranks.values() for value in found.values()]
    image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=min(everything), vmax=max(everything))
    axes.grid(visible=False)
    places = np.unique(np.linspace(0, len(eranks) - 1, 4).round().astype(int))
    axes.set_xticks(places, [f"{[*eranks][i]:,}" for i in places])
    axes.set_xlabel("step")
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    if projection == run.projections[-1]:
        axes.figure.colorbar(image, ax=axes, label="effective rank")


def draw_depths(axes: Axes, run: Measured, _: str) -> None:
    eranks = run.eranks()
    styles = ({"ls": "--", "lw": 0.9}, {"lw": 1.8, "marker": "o", "ms": 3})
    for projection, color in zip(run.projections, cycle(PROJECTION_COLORS), strict=False):
        moments = [found for found in eranks.values() if any(name == projection for name, _ in found)]
        for found, style in zip(moments[:1] + moments[-1:], styles, strict=False):
            points = sorted((depth, value) for (name, depth), value in found.items() if name == projection)
            axes.plot(*zip(*points, strict=True), color=color, label=projection if "marker" in style else None, **style)
    axes.set_xlabel("depth")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_shares(axes: Axes, run: Measured, projection: str) -> None:
    for share, color in (("head_share", PROJECTION_COLORS[0]), ("tail_share", PROJECTION_COLORS[4])):
        for suffix, style in (("", "-"), ("_null", ":")):
            steps, _, values = run.run.curve(f"spectra/summary/{projection}/{share}{suffix}_mean")
            axes.plot(steps, values, color=color, ls=style, label=f"{share}{suffix}")
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel("step")
    if projection == run.projections[-1]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_parts(axes: Axes, run: Measured, projection: str) -> None:
    """Stacked bars of means over neighbouring singular values."""
    layers = [parts for layer, parts in run.parts.items() if projection_of(layer) == projection]
    means = {}
    for name in ("low_rank", "sparse", "low_rank_null"):
        relative = [parts[name] / (parts["low_rank"][0] + parts["sparse"][0]) for parts in layers]
        means[name] = np.mean(cut_to_shortest(relative), axis=0)
    edges = np.unique(np.linspace(0, len(means["sparse"]), BARS + 1).round().astype(int))
    bars = {name: np.add.reduceat(mean, edges[:-1]) / np.diff(edges) for name, mean in means.items()}
    place = {"x": edges[:-1] + 1, "width": np.diff(edges), "align": "edge", "edgecolor": "white", "linewidth": 0.4}
    axes.bar(height=bars["low_rank"], color=PROJECTION_COLORS[1], label="L", **place)
    below = np.maximum(bars["low_rank"], 0)
    axes.bar(height=bars["sparse"], bottom=below, color=PROJECTION_COLORS[5], label="S", **place)
    axes.stairs(bars["low_rank_null"], edges + 1, color=INK, lw=1, label="L, S shuffled")
    axes.set_xlabel("index")
    if projection == run.split_projections[-1]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def draw_hidden(axes: Axes, run: Measured, metric: str) -> None:
    measured = run.of(f"hidden/{metric}/")
    places = sorted({place for found in measured.values() for place in found})
    for i, place in enumerate(places):
        steps = [step for step, found in measured.items() if place in found]
        color = STEPS(0.92 * i / max(len(places) - 1, 1))
        axes.plot(steps, [measured[step][place] for step in steps], color=color, label=place, marker="o", ms=2.5)
    axes.set_xlabel("step")
    if metric == run.hidden[-1]:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(places) // 13)


# Report ------------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #20262d; max-width: 1500px; margin: 2em auto; padding: 0 1.5em }}
table {{ border-collapse: collapse }} td, th {{ padding: .2em .9em; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }} figure {{ margin: 2em 0 }}
figcaption {{ color: #4a525b }}
</style>
<h1>{title}</h1>
{table}
{figures}
</html>
"""
FIGURE = '<figure><figcaption>{caption}</figcaption><img alt="{name}" src="data:image/png;base64,{data}"></figure>'


def report(run_dirs: list[Path], pictures: list[Picture]) -> str:
    """A self-contained HTML page: final values of each run, and the pictures."""
    figures = [
        FIGURE.format(caption=html.escape(p.caption), name=p.name, data=base64.b64encode(p.png).decode())
        for p in pictures
    ]
    title = "Spectra of " + ", ".join(run_dir.resolve().name for run_dir in run_dirs)
    return PAGE.format(title=html.escape(title), table=last_values(run_dirs), figures="\n".join(figures))


def last_values(run_dirs: list[Path]) -> str:
    """An HTML table of each run's last losses and mean effective ranks."""
    runs = [load_run(run_dir) for run_dir in run_dirs]
    projections = list(dict.fromkeys(projection for run in runs for projection in run.projections))
    metrics = {"training loss": "train/loss", "evaluation loss": "eval/loss"}
    metrics |= {f"effective rank, {name}": f"spectra/summary/{name}/erank_mean" for name in (*projections, "all")}
    rows = [["", *(run.name for run in runs)], ["step", *(f"{run.rows[-1]['step']:,}" for run in runs)]]
    rows += [[label, *(_shown(run.last(metric)) for run in runs)] for label, metric in metrics.items()]
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
