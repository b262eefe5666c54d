"""What is measured, as (section, layer, metric, value): only what shows or stores a metric spells its name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

from lrtrain.core.names import projection_of


class Metric(NamedTuple):
    section: str
    """`train`, `spectra`, …: what the names begin with."""
    layer: str | None
    """A layer's qualified name, or what stands for several layers; None of a metric of the whole run."""
    metric: str
    value: float

    @property
    def name(self) -> str:
        """`<section>/<layer>/<metric>`, or `<section>/<metric>`."""
        return "/".join(part for part in self[:3] if part is not None)


def scalars(section: str, values: Mapping[str, float]) -> list[Metric]:
    """Metrics of no layer, from their values by name."""
    return [Metric(section, None, metric, value) for metric, value in values.items()]


def spelled(metrics: Iterable[Metric]) -> dict[str, float]:
    """Values by the names under which metrics are logged."""
    return {metric.name: metric.value for metric in metrics}


def by_layer_and_projection(found: Mapping[str, Mapping[str, float]], section: str) -> list[Metric]:
    """Metrics of layers, and in `<section>/summary` their means over each projection and over all."""
    metrics: list[Metric] = []
    groups: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for layer, values in found.items():
        for metric, value in values.items():
            metrics.append(Metric(section, layer, metric, value))
            groups[projection_of(layer), f"{metric}_mean"].append(value)
            groups["all", f"{metric}_mean"].append(value)
    return metrics + [
        Metric(f"{section}/summary", of, metric, fmean(values)) for (of, metric), values in groups.items()
    ]
