"""A heatmap of one number per matrix: depth over projections."""

import math
from collections.abc import Mapping

import matplotlib
from matplotlib.figure import Figure

from lrtrain.core.names import depth_of, projection_of
from lrtrain.plotting.style import STYLE

MOST_NUMBERS = 250  # number of cells up to which values are written in them


def layer_heatmap(values: Mapping[str, float], title: str) -> Figure:
    """A heatmap of `values` by layer name, without layers outside the blocks; cells without a value stay white."""
    cells = {(depth, projection_of(name)): v for name, v in values.items() if (depth := depth_of(name)) is not None}
    depths = sorted({depth for depth, _ in cells})
    projections = list(dict.fromkeys(projection for _, projection in cells))
    grid = [[cells.get((depth, projection), math.nan) for projection in projections] for depth in depths]
    with matplotlib.rc_context(STYLE):
        size = (2.5 + 0.75 * len(projections), 1.6 + 0.28 * len(depths))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        highest = max(cells.values(), default=0.0)
        lowest = min(cells.values(), default=0.0)
        image = axes.imshow(grid, aspect="auto", cmap="viridis")
        axes.grid(visible=False)
        axes.set_xticks(range(len(projections)), projections, rotation=35, ha="right")
        axes.set_yticks(range(len(depths)), [str(depth) for depth in depths])
        axes.set_ylabel("depth")
        axes.set_title(title)
        figure.colorbar(image, ax=axes)
        if len(cells) <= MOST_NUMBERS:
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    if not math.isnan(value):
                        color = "black" if value > lowest + 0.6 * (highest - lowest) else "white"
                        axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=color, fontsize=7)
    return figure
