"""A picture of a simulated step: the time by kind of work."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from lrtrain.plotting.style import CAPTION, HEADLINE, RUN_COLORS, STYLE
from lrtrain.simulation.report import title
from lrtrain.simulation.roofline import PHASES, Phase, mfu, phase, whole
from lrtrain.simulation.step import Simulated

LABELS = {"matmul": "matrix products", "attention": "attention", "other": "other kernels"}


def draw(step: Simulated, path: Path) -> None:
    """Write the picture: for each phase the times of kernels by kind, of launching and of collectives."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.6))
        axes = figure.add_axes((0.17, 0.13, 0.8, 0.66))
        bars = [(f"{name}: {of}", parts) for name in PHASES[1:] for of, parts in bars_of(phase(step, name)).items()]
        for y, (_, parts) in enumerate(bars):
            left = 0.0
            for label, seconds in parts.items():
                axes.barh(y, 1e3 * seconds, left=1e3 * left, color=color_of(label), height=0.72)
                left += seconds
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("milliseconds")
        for label in (*LABELS.values(), "launching", "collectives"):
            axes.barh(0, 0, color=color_of(label), label=label)
        axes.legend(loc="lower right")
        told = f"{1e3 * whole(step).seconds:,.0f} ms per step by roofline, MFU {mfu(step):.0%}"
        figure.text(y=0.93, s=told, **HEADLINE)
        figure.text(y=0.86, s=title(step), **CAPTION)
        figure.savefig(path, dpi=150)


def bars_of(one: Phase) -> dict[str, dict[str, float]]:
    """The bars of a phase, which overlap in time, and the seconds of their parts."""
    return {
        "kernels": {LABELS[kind]: work.seconds for kind, work in one.kinds.items()},
        "launching": {"launching": one.launching},
        "collectives": {"collectives": one.wire},
    }


def color_of(label: str) -> str:
    return RUN_COLORS[[*LABELS.values(), "launching", "collectives"].index(label)]
