"""The summary of a finished run: summary.json, its picture, and the printed table."""

import json
import sys
from typing import Any

from lrtrain.core.files import write_durably
from lrtrain.distributed.collectives import max_over_ranks
from lrtrain.run.report import summary_rows
from lrtrain.run.state import Run
from lrtrain.run.throughput import peak_memory_gib
from lrtrain.tracking.console import print_summary


def summarize(run: Run, found: dict[str, Any]) -> dict[str, Any]:
    """Write and print the summary of a finished run, and return it. A collective.

    Args:
        found: values returned by the callbacks' `on_end`.
    """
    progress = run.progress
    (memory,) = max_over_ranks(peak_memory_gib(run.world.device))
    summary = {
        "run": run.config.run.name,
        "step": progress.step,
        "tokens": progress.tokens,
        "skipped": progress.skipped,
        **run.counts,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
        "memory_gib": memory,
        "world_size": run.world.size,
        **found,
    }
    if run.world.main:
        rows = summary_rows(summary)
        try:
            rows |= {"picture": draw_summary(run, summary)}
        except Exception as error:  # an error in drawing must not fail the run
            print(f"summary.json and its picture could not be written: {error}", file=sys.stderr, flush=True)
        print_summary(rows, sys.stdout)
    return {key: value for key, value in summary.items() if value is not None}


def draw_summary(run: Run, summary: dict[str, Any]) -> str:
    """Write summary.json and the picture of the run; returns the picture's path."""
    from lrtrain.analysis.plots import plot_run  # matplotlib takes a while to import: not before the first step

    write_durably(run.dir / "summary.json", json.dumps(summary, indent=1))
    picture = plot_run(run.dir)
    run.tracker.log_image(run.progress.step, "plots/run", picture)
    return str(picture)
