"""Time and memory of the factorized layers against a dense nn.Linear and the plain form that each method has in print.

All contenders hold the linears of one decoder block and take turns, so that a drifting machine slows them alike. Each
turn is a forward and a backward pass; figures are medians over turns, ratios are medians of each turn's own ratio.

    python scripts/bench_layers.py --model llama_60m --methods lowrank sltrain --tokens 512 2048
    python scripts/bench_layers.py --model llama_1b --overrides model.config.intermediate_size=5472 \\
        --methods sltrain sltrain:support=block,block=32

A method is a name from conf/param, with overrides of its keys after a colon.
"""

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler is chatty
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from published import FORMULAS, PLAIN, Contender, costs

from lrtrain.config.compose import compose
from lrtrain.config.dtypes import DTYPES
from lrtrain.core.streams import never_fail_to_print
from lrtrain.distributed.sharding import take_over
from lrtrain.errors import ConfigError
from lrtrain.layers.autotune import device_name, seconds
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.build import make_model
from lrtrain.model.structure import blocks

MIB = 2**20
Shape = tuple[int, int]  # (out, in)


EXECUTIONS = {"sltrain": ("materialize", "factored", "triton")}  # what `auto` chooses from


# --- the contenders ----------------------------------------------------------------------------------------------


def block_layers(model: str, overrides: list[str], method: str) -> dict[Shape, tuple[FactorizedLinear, int]]:
    """One meta layer of each shape in a decoder block, and how often the shape occurs."""
    name, _, changes = method.partition(":")
    changed = [f"param.{change}" for change in changes.split(",") if change]
    config = compose(f"model={model}", "model.config.num_hidden_layers=1", *overrides, f"param={name}", *changed)
    found: dict[Shape, tuple[FactorizedLinear, int]] = {}
    for layer in blocks(make_model(config))[0].modules():
        if isinstance(layer, FactorizedLinear):
            shape = (layer.out_features, layer.in_features)
            found[shape] = (layer, 1 + found.get(shape, (layer, 0))[1])
    return found


def filled(layer: FactorizedLinear, dtype: torch.dtype, device: torch.device) -> FactorizedLinear:
    """The layer with its initial values on the device."""
    generator = torch.Generator().manual_seed(0)
    layer.to_empty(device=device)
    with torch.no_grad():
        take_over(layer, layer.init_parameters(generator) | layer.init_buffers(generator))
    return layer.to(dtype)


def executed(layer: FactorizedLinear, execution: str) -> FactorizedLinear:
    """The same layer, executed so."""
    twin = copy.copy(layer)
    twin.execution = execution
    return twin


def contenders(method: str, layer: FactorizedLinear, tokens: int, dtype: torch.dtype, device: torch.device):
    """Our layer and its published form by name, for `auto` each execution; and what it chose among them."""
    name = method.partition(":")[0]
    chosen = layer.autotune(tokens, dtype, device)
    formula = FORMULAS[name](layer, dtype.itemsize) if name in FORMULAS else None
    forms: dict[str, Contender] = {}
    if name in PLAIN and name == method:
        forms[f"{method}, plain"] = PLAIN[name](layer)
    if layer.execution == "auto" and name in EXECUTIONS:
        for execution in EXECUTIONS[name]:
            if runs(layer, execution, tokens, dtype, device):
                forms[f"{method}, {execution}"] = Contender(executed(layer, execution), *costs(layer), formula)
        return forms, chosen
    layer.execution = chosen
    forms[method] = Contender(layer, *costs(layer), formula)
    return forms, None


def runs(layer: FactorizedLinear, execution: str, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        executed(layer, execution).autotune(tokens, dtype, device)
    except ConfigError:
        return False
    return True


# --- measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """The figures of one contender: of one shape, or of all linears of a block."""

    model: str
    dtype: str
    tokens: int
    contender: str
    shape: str
    ms: float
    ratio: float
    """Time over the dense one's: the median of the turns' ratios."""
    peak_mib: float
    """Most memory that a forward and backward pass of one linear held beyond its inputs."""
    stored_mib: float
    """Parameters and support."""
    formula_mib: float | None
    flops_ratio: float


@dataclass
class Choice:
    """What `auto` chose, and how much slower that is than the best execution as measured here."""

    model: str
    dtype: str
    tokens: int
    method: str
    shape: str
    chosen: str
    behind: float


def measure(args: argparse.Namespace, dtype_name: str, tokens: int) -> tuple[list[Row], list[Choice]]:
    """All contenders on all shapes of a block, in turns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[dtype_name]
    forms: dict[Shape, dict[str, Contender]] = {}
    counts: dict[Shape, int] = {}
    chosen: dict[tuple[Shape, str], str] = {}
    for method in args.methods:
        for shape, (layer, count) in block_layers(args.model, args.overrides, method).items():
            if shape not in forms:
                dense = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)
                forms[shape], counts[shape] = {"dense": Contender(dense, *costs(dense))}, count
            more, execution = contenders(method, filled(layer, dtype, device), tokens, dtype, device)
            forms[shape] |= more
            if execution is not None:
                chosen[shape, method] = execution

    passes = {
        (shape, name): training_pass(form, shape, tokens, dtype, device)
        for shape, named in forms.items()
        for name, form in named.items()
    }
    times: dict[tuple[Shape, str], list[float]] = {key: [] for key in passes}
    for _ in range(args.rounds + 1):
        for key, run in passes.items():
            times[key].append(seconds(run, device))
    times = {key: taken[1:] for key, taken in times.items()}  # the first turn warms up
    peaks = {key: peak_bytes(run, device) for key, run in passes.items()}
    for (shape, method), execution in chosen.items():  # `auto` is the execution that it chose
        same = f"{method}, {execution}"
        forms[shape][method] = forms[shape][same]
        times[shape, method], peaks[shape, method] = times[shape, same], peaks[shape, same]

    def row(name: str, weights: dict[Shape, int], label: str) -> Row:
        own = [sum(n * times[s, name][i] for s, n in weights.items()) for i in range(args.rounds)]
        dense = [sum(n * times[s, "dense"][i] for s, n in weights.items()) for i in range(args.rounds)]
        formulas = [forms[s][name].formula for s in weights]
        return Row(
            *(args.model, dtype_name, tokens, name, label),
            ms=1e3 * statistics.median(own),
            ratio=statistics.median(a / b for a, b in zip(own, dense, strict=True)),
            peak_mib=max(peaks[s, name] for s in weights) / MIB,
            stored_mib=sum(n * forms[s][name].stored for s, n in weights.items()) / MIB,
            formula_mib=None
            if None in formulas
            else sum(n * (forms[s][name].formula or 0) for s, n in weights.items()) / MIB,
            flops_ratio=sum(n * forms[s][name].flops for s, n in weights.items())
            / sum(n * forms[s]["dense"].flops for s, n in weights.items()),
        )

    def choices() -> Iterator[Choice]:
        for (shape, method), execution in chosen.items():
            rivals = [f"{method}, {e}" for e in EXECUTIONS[method.partition(":")[0]]]
            best = min(statistics.median(times[shape, name]) for name in rivals if name in forms[shape])
            behind = statistics.median(times[shape, method]) / best - 1
            yield Choice(args.model, dtype_name, tokens, method, label_of(shape), execution, behind)

    names = list(next(iter(forms.values())))
    parts = {label_of(shape): {shape: 1} for shape in forms} | {"block": counts}
    return [row(name, weights, label) for label, weights in parts.items() for name in names], list(choices())


def label_of(shape: Shape) -> str:
    return f"{shape[0]}×{shape[1]}"


def training_pass(
    form: Contender, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """Forward, and backward to the input and all parameters."""
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, shape[0], device=device, dtype=dtype)
    return lambda: torch.autograd.grad(form.forward(x), (x, *form.parameters), g)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that the call held beyond what there was before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)


# --- showing -----------------------------------------------------------------------------------------------------


def print_rows(rows: list[Row], choices: list[Choice]) -> None:
    console = Console(width=140)
    first = rows[0]
    title = f"{first.model}, {first.dtype}, {first.tokens} tokens, {torch.get_num_threads()} threads"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("out×in", "", "ms", "time / dense", "FLOPs / dense", "peak MiB", "stored MiB", "formula"):
        table.add_column(column, justify="left" if column in ("out×in", "") else "right")
    shape = None
    for row in rows:
        if shape not in (None, row.shape):
            table.add_section()
        table.add_row(
            row.shape if row.shape != shape else "",
            row.contender,
            f"{row.ms:,.1f}",
            f"[bold]{row.ratio:.2f}",
            f"{row.flops_ratio:.2f}",
            f"{row.peak_mib:,.1f}",
            f"{row.stored_mib:,.2f}",
            "" if row.formula_mib is None else f"{row.formula_mib:,.2f}",
        )
        shape = row.shape
    console.print(table)
    for choice in choices:
        verdict = "the better" if not choice.behind else f"{choice.behind:.1%} behind the better"
        console.print(f"auto, {choice.method} {choice.shape}: {choice.chosen}, {verdict}", highlight=False)


def draw(rows: list[Row], path: Path) -> None:
    """Time and peak memory of a block's linears, forward and backward, relative to dense; a row per dtype."""
    rows = [row for row in rows if row.shape == "block"]
    executions = tuple(f", {e}" for several in EXECUTIONS.values() for e in several)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    names = [n for n in dict.fromkeys(row.contender for row in rows) if n != "dense" and not n.endswith(executions)]
    methods = dict.fromkeys(name.removesuffix(", plain") for name in names)
    colors = {method: f"C{i % 10}" for i, method in enumerate(methods)}
    figure = Figure(figsize=(11, 3.8 * len(dtypes)), layout="constrained")
    axes = figure.subplots(len(dtypes), 2, squeeze=False)
    for (left, right), dtype in zip(axes, dtypes, strict=True):
        dense = {row.tokens: row for row in rows if row.dtype == dtype and row.contender == "dense"}
        for name in names:
            mine = [row for row in rows if row.dtype == dtype and row.contender == name]
            tokens = [row.tokens for row in mine]
            style = {
                "marker": "o",
                "color": colors[name.removesuffix(", plain")],
                "linestyle": "--" if "plain" in name else "-",
            }
            left.plot(tokens, [row.ratio for row in mine], label=name, **style)
            right.plot(tokens, [row.peak_mib / dense[row.tokens].peak_mib for row in mine], label=name, **style)
        for axis, what in ((left, "time"), (right, "peak memory")):
            axis.axhline(1, color="black", linewidth=1)
            axis.set_xscale("log", base=2)
            axis.set_xticks(list(dense), [f"{tokens:,}" for tokens in dense])
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set(xlabel="tokens", title=f"{rows[0].model}, {dtype}: {what} / dense")
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m", help="a name from conf/model: its shapes and ranks")
    parser.add_argument("--methods", nargs="+", default=[*PLAIN], help="name or name:key=value,key=value")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], help="per pass")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["fp32"], help="some CPUs have no fast bf16"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument("--threads", type=int, help="of the CPU; all by default")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, for all methods")
    parser.add_argument(
        "--out", type=Path, default=Path("bench_layers"), help="path of the .json and .png, without suffix"
    )
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    rows: list[Row] = []
    choices: list[Choice] = []
    for dtype in args.dtypes:
        for tokens in args.tokens:
            try:
                new_rows, new_choices = measure(args, dtype, tokens)
            except ConfigError as error:
                sys.exit(str(error))
            print_rows(new_rows, new_choices)
            rows += new_rows
            choices += new_choices
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": args.rounds,
        "overrides": args.overrides,
        "rows": [asdict(row) for row in rows],
        "auto": [asdict(choice) for choice in choices],
    }
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    draw(rows, args.out.with_suffix(".png"))
    print(f"written: {args.out.with_suffix('.json')} {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    never_fail_to_print()
    main()
