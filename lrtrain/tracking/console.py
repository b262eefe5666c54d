"""Progress on the console: one live line on a terminal, plain lines in a log file."""

import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from tqdm import tqdm

from lrtrain.core.metrics import Metric, spelled
from lrtrain.tracking.base import Tracker, Value


class ConsoleTracker(Tracker):
    """`step 120/800  loss 4.213  lr 2.9e-3  12.3k tok/s  eta 1m58s`, and a line for each evaluation and measurement."""

    def __init__(self, total_steps: int, stream: TextIO):
        self._total_steps = total_steps
        self._stream = stream
        self._bar = _live_line(total_steps, stream) if stream.isatty() else None
        self._first: tuple[int, float] | None = None  # step and time of the first progress line

    def log(self, step: int, tokens: int, metrics: Sequence[Metric]) -> None:
        at = f"{step}/{self._total_steps}"
        values = spelled(metrics)
        if "train/loss" in values:
            self._show_progress(step, f"step {at}  {self._progress(step, values)}")
        if "eval/loss" in values:
            found = "  ".join(f"{of.metric} {of.value:.4g}" for of in metrics if of.section == "eval")
            self._print(f"eval {at}  {found}")
        if (ranks := _effective_rank(values)) is not None:
            self._print(f"spectra {at}  {ranks}")

    def finish(self, summary: Mapping[str, Value], exit_code: int) -> None:
        if self._bar is not None:
            self._bar.close()

    def _progress(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"loss {metrics['train/loss']:.3f}"]
        if "train/lr" in metrics:
            parts.append(f"lr {_scientific(metrics['train/lr'])}")
        if "perf/tokens_per_second" in metrics:
            parts.append(f"{_compact(metrics['perf/tokens_per_second'])} tok/s")
        eta = self._seconds_left(step)
        return "  ".join(parts if eta is None else [*parts, f"eta {_duration(eta)}"])

    def _seconds_left(self, step: int) -> float | None:
        """Remaining seconds by the mean speed since the first line, which includes evaluations and checkpoints but not
        the slow first steps."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step == first_step:
            return None
        return (self._total_steps - step) * (now - first_time) / (step - first_step)

    def _show_progress(self, step: int, line: str) -> None:
        if self._bar is None:
            self._print(line)
        else:
            self._bar.n = step
            self._bar.set_description_str(line)

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)


def print_summary(rows: Mapping[str, Value], stream: TextIO) -> None:
    """A table of names and values, above the live line if there is one."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else f"{value}" for name, value in rows.items()}
    name_width = max(map(len, shown))
    value_width = max(map(len, shown.values()))
    for name, value in shown.items():
        tqdm.write(f"{name:<{name_width}}  {value:>{value_width}}", file=stream)
    stream.flush()


def _live_line(total_steps: int, stream: TextIO) -> tqdm:
    return tqdm(total=total_steps, file=stream, bar_format="{bar:24} {desc}", dynamic_ncols=True)


def _effective_rank(metrics: Mapping[str, float]) -> str | None:
    """The mean effective rank of layers with exact spectra, or of estimated ones if there are none."""
    summary = "spectra/summary/all"
    if f"{summary}/erank_mean" in metrics:
        rank, share = metrics[f"{summary}/erank_mean"], metrics[f"{summary}/erank_rel_mean"]
        return f"mean effective rank {rank:.1f}, {share:.0%} of the possible"
    estimated = metrics.get(f"{summary}/erank_estimated_mean")
    return None if estimated is None else f"mean effective rank {estimated:.1f}, estimated"


def _scientific(value: float) -> str:
    """0.0029 → 2.9e-3."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _compact(value: float) -> str:
    """12345 → 12.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    """118 → 1m58s; the two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
