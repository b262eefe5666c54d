"""Sinks of a run's metrics: metrics.jsonl (which has everything), the console, Weights & Biases."""

import sys
from pathlib import Path

from lrtrain.config.schema import TrackingConfig
from lrtrain.tracking.base import Tracker
from lrtrain.tracking.console import ConsoleTracker
from lrtrain.tracking.fanout import FanOut
from lrtrain.tracking.jsonl import JsonlTracker
from lrtrain.tracking.wandb_sink import WandbTracker

__all__ = ["Tracker", "TrackingConfig", "open_tracker"]


def open_tracker(cfg: TrackingConfig, run_dir: Path, run_id: str, config: dict, total_steps: int) -> Tracker:
    """A tracker with all sinks, for the main process; the others use a plain `Tracker()`, which records nothing.

    Args:
        run_id: stays the same when a run is resumed, so that its curves continue; at most 64 characters.
        config: the whole configuration, as plain containers.
    """
    sinks: dict[str, Tracker] = {
        "jsonl": JsonlTracker(run_dir, run_id),
        "console": ConsoleTracker(total_steps, sys.stdout),
    }
    if cfg.wandb != "disabled":
        try:
            sinks["wandb"] = WandbTracker(cfg, run_dir, run_id, config)
        except Exception as error:  # no network, no login: metrics.jsonl has everything
            print(f"tracking: wandb did not start ({error}); the run goes on without it", file=sys.stderr)
    return FanOut(sinks)
