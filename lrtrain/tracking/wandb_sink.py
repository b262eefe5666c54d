"""Weights & Biases, a mirror of metrics.jsonl, offline by default.

The step is logged as a metric (`train/step`, the x-axis of every chart), not as wandb's step: wandb's step cannot go
back, so wandb would drop the repeated steps after a restart from an older checkpoint.

Scalars are logged at every step that has them. Tables and pictures are larger than all else in a run's directory (about
1 MB for each measurement of 28 layers; wandb writes every table twice, as media and as an artifact): they are logged
ever more rarely (`GROWTH`), and at the end. spectra/*.npz has all spectra.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lrtrain.config.schema import TrackingConfig
from lrtrain.core.metrics import Metric, spelled
from lrtrain.core.names import depth_of, projection_of
from lrtrain.tracking.base import Tracker, Value
from lrtrain.tracking.spectra_files import PARTS

STEP = "train/step"
LAYERED = ("spectra", "gradients", "updates")  # sections with metrics per layer
DEPTHS_SHOWN = 8  # wandb slows down at about 10,000 distinct keys
GROWTH = 1.1  # from a step with tables and pictures to the next one: 62 of 2,000 measurements at equal distances
FLUSH_SECONDS = 1.0  # a killed process would lose wandb's default buffer of 15 s


class WandbTracker(Tracker):
    def __init__(self, cfg: TrackingConfig, run_dir: Path, run_id: str, config: dict):
        import wandb  # takes half a second

        run_dir = run_dir.resolve()
        os.environ["WANDB_DATA_DIR"] = str(run_dir / "wandb")  # else tables are stored in the home directory
        kinds = [name for key in ("model", "param", "optim") if (name := (config.get(key) or {}).get("name"))]
        self._wandb = wandb
        self._run = wandb.init(
            mode=cfg.wandb,
            project=cfg.project,
            entity=cfg.entity,
            group=cfg.group,
            tags=[*cfg.tags, *kinds],
            job_type=(config.get("param") or {}).get("name"),
            id=run_id,
            name=run_dir.name,
            resume="allow",
            dir=run_dir,
            config=config,
            settings=wandb.Settings(console="off", silent=True, x_transaction_log_flush_interval=FLUSH_SECONDS),
        )
        for handler in logging.getLogger("wandb").handlers:
            handler.handleError = lambda record: None  # else each line gives a traceback on a full disk
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._shown: dict[str, int] = {}
        self._held: dict[str, Callable[[], dict[str, Any]]] = {}

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        """Log scalars (of layers at most at 8 depths), and show a table of all layers for each section, with a heatmap
        of their effective ranks."""
        by_layer = layer_metrics(metrics)
        shown = {depth_of(layer) for layers in by_layer.values() for layer in layers}
        depths = {None, *evenly(sorted(depth for depth in shown if depth is not None), DEPTHS_SHOWN)}
        row: dict[str, Any] = spelled(
            of for of in metrics if of.section not in LAYERED or of.layer is None or depth_of(of.layer) in depths
        )
        self._run.log({STEP: step, "train/tokens": tokens, **row})
        for section, layers in by_layer.items():
            self._show(section, step, partial(self._layers, step, section, layers))

    def log_spectra(self, step: int, spectra: Mapping[str, np.ndarray]) -> None:
        """Show for each projection a table of σ, a chart of σ over the index with one line per layer, and a table of
        the contributions of the layers' parts."""
        self._show("arrays", step, partial(self._arrays, step, spectra))

    def log_image(self, step: int, name: str, path: Path) -> None:
        self._run.log({STEP: step, name: self._wandb.Image(str(path))})

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        try:
            for row in self._held.values():
                self._run.log(row())
        finally:
            self._run.summary.update(dict(summary))
            self._run.finish(exit_code=exit_code)

    def _show(self, name: str, step: int, row: Callable[[], dict[str, Any]]) -> None:
        """Log a row of tables and pictures if `step` is a tenth beyond the last one shown under this name; else hold it
        until a later one replaces it or the run finishes."""
        if name in self._shown and step < GROWTH * self._shown[name]:
            self._held[name] = row
            return
        self._held.pop(name, None)
        self._shown[name] = step
        self._run.log(row())

    def _layers(self, step: int, section: str, layers: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The table of a section, and the heatmap of its effective ranks if it is that of the weights."""
        row: dict[str, Any] = {STEP: step, f"layers/{section}": self._table(step, layers)}
        eranks = {layer: m.get("erank", m.get("erank_estimated")) for layer, m in layers.items()}
        erank = {layer: value for layer, value in eranks.items() if value is not None}
        if section == "spectra" and erank:
            row["layers/erank"] = self._heatmap(erank, f"effective rank at step {step}")
        return row

    def _arrays(self, step: int, spectra: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The charts and tables of all projections."""
        projections: defaultdict[str, dict[str, np.ndarray]] = defaultdict(dict)
        for layer, sigma in spectra.items():
            if "/" not in layer:
                projections[projection_of(layer)][layer] = sigma
        row: dict[str, Any] = {STEP: step}
        for name, layers in projections.items():
            row[f"spectra_curves/{name}"] = self._chart(step, name, layers)
            if parted := [layer for layer in layers if f"{layer}/{PARTS[0]}" in spectra]:
                row[f"contributions/{name}"] = self._contributions(step, parted, spectra)
        return row

    def _table(self, step: int, layers: Mapping[str, Mapping[str, float]]):
        """A table with a row for each layer; missing values stay empty."""
        metrics = sorted({metric for found in layers.values() for metric in found})
        rows: list[Any] = [
            [step, layer, projection_of(layer), depth_of(layer), *(found.get(metric) for metric in metrics)]
            for layer, found in layers.items()
        ]
        return self._wandb.Table(columns=["step", "layer", "projection", "depth", *metrics], data=rows)

    def _heatmap(self, values: Mapping[str, float], title: str):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a while: only where there are spectra

        from lrtrain.plotting.heatmap import layer_heatmap

        canvas = FigureCanvasAgg(layer_heatmap(values, title))
        canvas.draw()
        return self._wandb.Image(np.asarray(canvas.buffer_rgba()))

    def _chart(self, step: int, projection: str, layers: Mapping[str, np.ndarray]):
        rows: list[Any] = [
            [step, layer, int(index), float(sigma[index])]
            for layer, sigma in layers.items()
            for index in shown_indices(len(sigma))
        ]
        columns = {"step": int, "layer": str, "index": int, "sigma": float}
        # Explicit types are three times as fast as wandb's inference row by row.
        types = list(columns.values())
        table = self._wandb.Table(columns=list(columns), data=rows, dtype=types, optional=False)
        return self._wandb.plot_table(
            vega_spec_name="wandb/lineseries/v0",
            data_table=table,
            fields={"step": "index", "lineKey": "layer", "lineVal": "sigma"},
            string_fields={"title": f"Singular values of {projection} at step {step}", "xname": "index"},
        )

    def _contributions(self, step: int, layers: list[str], spectra: Mapping[str, np.ndarray]):
        rows: list[Any] = [
            [step, layer, int(index), *(float(spectra[name][index]) for name in (layer, *parts))]
            for layer in layers
            for parts in [[f"{layer}/{part}" for part in PARTS]]
            for index in shown_indices(len(spectra[layer]))
        ]
        types: list[Any] = [int, str, int, *[float] * (1 + len(PARTS))]
        columns: list[Any] = ["step", "layer", "index", "sigma", *PARTS]
        return self._wandb.Table(columns=columns, data=rows, dtype=types, optional=False)


def layer_metrics(metrics: Sequence[Metric]) -> dict[str, dict[str, dict[str, float]]]:
    """Section → layer → metric → value, for the metrics of layers in the sections `LAYERED`."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for section, layer, metric, value in metrics:
        if section in LAYERED and layer is not None:
            found.setdefault(section, {}).setdefault(layer, {})[metric] = value
    return found


def evenly(values: list[int], most: int) -> list[int]:
    """At most `most` of the values, evenly spaced, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def shown_indices(length: int) -> np.ndarray:
    """At most 64 indices below `length`: the first 16, then evenly spaced on a logarithmic axis."""
    if length <= 64:
        return np.arange(length)
    return np.unique(np.concatenate([np.arange(16), np.geomspace(16, length - 1, 48).round().astype(int)]))
