"""Printing the progress and outcomes of a sweep's jobs."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lrtrain.sweeps.jobs import Job, Outcome, Sweep, write_outcomes


class SweepFailed(RuntimeError):
    """Some jobs of a sweep failed; their errors have been printed."""


class Tell:
    """Prints the start and end of each job, on one process."""

    def __init__(self, sweep: Sweep, speaks: bool):
        self.sweep = sweep
        self.speaks = speaks

    def starts(self, job: Job) -> None:
        if self.speaks:
            print(f"\n=== {self.sweep.name}: {job.name}", flush=True)

    def ended(self, outcome: Outcome) -> None:
        if self.speaks:
            write_outcomes(self.sweep.folder, [outcome])
            stream = sys.stderr if outcome.status == "failed" else sys.stdout
            print(f"=== {outcome.job}: {outcome.status} {outcome.detail}".rstrip(), file=stream, flush=True)


def run_needed(
    jobs: list[Job], found: Sequence[Outcome | None], run: Callable[[list[Job]], list[Outcome]], tell: Tell
) -> list[Outcome]:
    """The outcomes of all jobs: known ones, printed first, and those of `run` for the other jobs.

    A job that a search proposes twice at a time is run once.
    """
    outcomes = {job.name: outcome for job, outcome in zip(jobs, found, strict=True)}
    for outcome in filter(None, outcomes.values()):
        tell.ended(outcome)
    left = {job.name: job for job in jobs if outcomes[job.name] is None}
    ran = {outcome.job: outcome for outcome in run([*left.values()])}
    return [outcomes[job.name] or ran[job.name] for job in jobs]


def print_outcomes(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Print a table of all jobs."""
    table = Table(title=f"{sweep.name} ({sweep.folder})", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("job", "ended", "parameters", "eval perplexity", "tokens/s"):
        table.add_column(column, justify="left" if column in ("job", "ended") else "right", overflow="fold")
    for one in outcomes:
        found = one.summary
        cells = [
            f"{found[key]:{form}}" if found.get(key) is not None else "-"
            for key, form in (("parameters", ",d"), ("eval_perplexity", ".2f"), ("tokens_per_second", ",.0f"))
        ]
        table.add_row(one.job, escape(f"{one.status} {one.detail}".rstrip()), *cells)
    Console(width=140).print(table)
    if failed := Counter(one.status for one in outcomes)["failed"]:
        print(
            f"{failed} of {len(outcomes)} jobs failed; the same line tries them again, and only them", file=sys.stderr
        )
    sys.stdout.flush()
    sys.stderr.flush()
