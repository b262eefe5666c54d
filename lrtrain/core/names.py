"""What a module's name says about its place in the network, and how what is measured of it is named."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean


def projection_of(layer: str) -> str:
    """`model.layers.3.self_attn.q_proj` → `q_proj`."""
    return layer.rpartition(".")[2]


def depth_of(layer: str) -> int | None:
    """`model.layers.3.self_attn.q_proj` → 3; None outside the stack of blocks (`lm_head`)."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), None)


def by_layer_and_projection(found: Mapping[str, Mapping[str, float]], section: str) -> dict[str, float]:
    """Metrics of layers under the names they are logged by, with the means over each projection and over all."""
    metrics: dict[str, float] = {}
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for layer, values in found.items():
        for metric, value in values.items():
            metrics[f"{section}/{layer}/{metric}"] = value
            groups[f"{section}/summary/{projection_of(layer)}/{metric}_mean"].append(value)
            groups[f"{section}/summary/all/{metric}_mean"].append(value)
    return metrics | {name: fmean(values) for name, values in groups.items()}
