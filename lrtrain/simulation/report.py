"""A simulated step as tables."""

from collections import Counter
from collections.abc import Iterable
from heapq import nlargest

from rich import box
from rich.console import Console
from rich.table import Table

from lrtrain.simulation.roofline import PHASES, Phase, mfu, phase, whole
from lrtrain.simulation.step import Simulated

COLUMNS = ("syncs", "kernels", "GB moved", "GB received", "peak, GiB", "executed / own FLOPs", "roofline, ms", "MFU")
"""Of `markdown_row`."""


def title(step: Simulated) -> str:
    config, train = step.config, step.config.train
    tokens = train.batch_size // step.gpus * config.data.seq_len
    return (
        f"{config.model.name} · {config.param['name']} · {config.optim['name']} · {config.engine['name']} · "
        f"process {step.dist_rank} of {step.gpus} {step.gpu.name} · {tokens:,} tokens each"
    )


def print_report(step: Simulated) -> None:
    """Print all tables."""
    console = Console(width=120)
    console.print(phases_table(step))
    for name, rows in details(step).items():
        if rows:
            console.print(details_table(name, rows))
    console.print(f"Simulated in {step.took:.0f} s; {step.empty_shards} parameters have no entry on this process.")


def phases_table(step: Simulated) -> Table:
    """The step by phase."""
    table = Table(title=title(step), box=box.SIMPLE)
    table.add_column("")
    phases = [phase(step, name) for name in PHASES]
    for name in (*PHASES, "step"):
        table.add_column(name, justify="right")
    for label, of in _rows().items():
        table.add_row(label, *(of(one) for one in (*phases, whole(step))))
    executed = whole(step).flops / step.own_flops
    table.add_row("model's own TFLOP", "", "", "", "", f"{step.own_flops / 1e12:,.2f}  (executed {executed:.2f} ×)")
    table.add_row("[bold]MFU", "", "", "", "", f"[bold]{mfu(step):.1%}")
    fits = f"{step.peak / 2**30 / step.gpu.memory:.0%} of {step.gpu.memory:g} GiB"
    table.add_row("memory of the GPU", "", "", "", "", fits)
    return table


def _rows():  # noqa: ANN202  (functions of a `Phase` that format one of its figures)
    def ms(kind: str):  # noqa: ANN202
        return lambda one: f"{1e3 * one.kinds[kind].seconds:,.2f}"

    found = {
        "peak, GiB": lambda one: f"{one.peak / 2**30:,.3f}",
        "kernels": lambda one: f"{one.kernels:,}",
        "TFLOP executed": lambda one: f"{one.flops / 1e12:,.2f}",
        "GB moved in memory": lambda one: f"{one.moved / 1e9:,.2f}",
        "GB received": lambda one: f"{one.received / 1e9:,.3f}",
        "ms: matrix products": ms("matmul"),
        "  attention": ms("attention"),
        "  other kernels": ms("other"),
        "  launching (beside them)": lambda one: f"{1e3 * one.launching:,.2f}",
        "  collectives (beside them)": lambda one: f"{1e3 * one.wire:,.2f}",
        "[bold]roofline, ms": lambda one: f"[bold]{1e3 * one.seconds:,.2f}",
    }
    return found


def details(step: Simulated) -> dict[str, list[tuple[str, ...]]]:
    """Syncs, copies, collectives and slowest operators, and errors, as rows of text."""
    counts = step.counts
    copies = [(p, line, way, str(w.count), _bytes(w.bytes)) for (p, line, way), w in counts.copies.items()]
    sent = [(p, device, name, str(w.count), _bytes(w.bytes)) for (p, device, name), w in counts.collectives.items()]
    longest = nlargest(8, counts.seconds.items(), key=lambda one: one[1])
    slowest = [(p, name, f"{1e3 * seconds:,.2f} ms") for (p, name), seconds in longest]
    return {
        "the CPU waits for the GPU (syncs)": _counted(counts.syncs),
        "copies between CPU and GPU": copies,
        "collectives, bytes received": sent,
        "operators by time": slowest,
        "operators on several devices, which fail on a GPU": _counted(counts.mixed),
    }


def _counted(counter: Counter) -> list[tuple[str, ...]]:
    return [(*key, str(count)) for key, count in counter.items()]


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.3f} GB" if count >= 1e6 else f"{count:,.0f} B"


def details_table(name: str, rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=name, box=box.SIMPLE, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown_row(step: Simulated) -> str:
    """The step as a row of a markdown table with `COLUMNS`."""
    all_of_it: Phase = whole(step)
    cells = (
        f"{sum(step.counts.syncs.values())}",
        f"{all_of_it.kernels:,}",
        f"{all_of_it.moved / 1e9:,.0f}",
        f"{all_of_it.received / 1e9:,.1f}",
        f"{step.peak / 2**30:,.1f}",
        f"{all_of_it.flops / step.own_flops:.2f}",
        f"{1e3 * all_of_it.seconds:,.0f}",
        f"{mfu(step):.0%}",
    )
    return f"| {' | '.join(cells)} |"
