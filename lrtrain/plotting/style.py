"""The style of all pictures: fonts, colors, and formatting of counts."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex, to_rgb

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": "#4a525b",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "xtick.color": "#4a525b",
    "ytick.color": "#4a525b",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


HEADLINE = {"x": 0.012, "ha": "left", "fontsize": 14, "weight": "bold"}


CAPTION = {"x": 0.012, "ha": "left", "fontsize": 10.5}


# Neighbours are similar, since q, k, v, o and gate, up, down belong together; runs need contrast.
PROJECTION_COLORS = ("#1f4e79", "#4a90c2", "#2a9d8f", "#84b59f", "#c8553d", "#e9a03b", "#8a5a83", "#6b7280")


RUN_COLORS = (
    *("#1f4e79", "#c8553d", "#2a9d8f", "#e9a03b", "#8a5a83"),
    *("#4a90c2", "#84b59f", "#6b7280", "#c2477f", "#20262d"),
)


INK, MUTED, ACCENT = "#20262d", "#aab4bf", "#c8553d"


FAINT = 1e-5  # share of the largest singular value below which values are not drawn


def run_colors(count: int) -> list[str]:
    """Distinct colors for runs."""
    if count <= len(RUN_COLORS):
        return [*RUN_COLORS[:count]]
    return [to_hex(color) for color in matplotlib.colormaps["turbo"](np.linspace(0.04, 0.96, count))]


def compact_count(value: float) -> str:
    """13_100_000 → 13.1M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _tint(color: str, strength: float) -> tuple[float, ...]:
    """The color mixed with white; strength 1 is the color itself."""
    return tuple(1 - strength * (1 - channel) for channel in to_rgb(color))
