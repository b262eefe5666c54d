"""Step time and state of each optimizer for one block's matrices, and the time of a new projection basis.

python scripts/bench_optimizers.py --model llama_1b --rounds 5

Steps of all optimizers alternate within one process, so that ratios are robust against changes of the machine's speed.
Compared with torch's AdamW; GaLore's basis is compared with the published one, a thin SVD of the whole gradient.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.core.seeds import generator_for
from lrtrain.core.streams import never_fail_to_print
from lrtrain.linalg.dct import dct
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.dct_columns import top_columns
from lrtrain.optim.projections import randomized_basis, svd_basis

OPTIMIZERS = ("adamw", "adamw8bit", "galore", "fira", "apollo", "apollo_mini", "dct_adamw", "muon", "trion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama_60m", "llama_350m", "llama_1b"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-svd", action="store_true", help="skip the published SVD, which is slow at 1B")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    found = {name: measure(name, options.rounds, not options.no_svd) for name in options.model}
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


def measure(model: str, rounds: int, svd: bool) -> dict[str, dict]:
    """Print and return the results for one model's shapes."""
    config = compose(f"model={model}").model.config
    d, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = [(d, d)] * 4 + [(hidden, d)] * 2 + [(d, hidden)]
    steps = compare_steps(shapes, rounds)
    print_table(
        f"{model}: one block's matrices, a step between refreshes",
        ["", "ms", "time / torch's AdamW", "state MiB", "state / AdamW's"],
        [
            [name, f"{1e3 * t:.1f}", f"{t / steps['torch AdamW'][0]:.2f}", f"{b / 2**20:.1f}",
             f"{b / steps['torch AdamW'][1]:.3f}"]
            for name, (t, b) in steps.items()
        ],
    )  # fmt: skip
    refreshes = {}
    for shape in dict.fromkeys(shapes):
        refreshes[f"{shape[0]}×{shape[1]}"] = rows = compare_refreshes(*shape, rounds, svd)
        slowest = max(t for t, _ in rows.values())
        print_table(
            f"{model}: the basis of one gradient {shape[0]}×{shape[1]}, r = {min(shape) // 4}",
            ["", "ms", "× faster than the slowest", "energy kept"],
            [[name, f"{1e3 * t:.1f}", f"{slowest / t:.1f}", f"{e:.4f}"] for name, (t, e) in rows.items()],
        )
    return {"steps": steps, "refreshes": refreshes}


def compare_steps(shapes: list[tuple[int, int]], rounds: int) -> dict[str, tuple[float, int]]:
    """Optimizer → (median seconds of a step, bytes of state)."""
    calls: dict[str, Callable[[], None]] = {}
    sizes: dict[str, int] = {}
    gradients = [torch.randn(shape) for shape in shapes]
    for name in ("torch AdamW", *OPTIMIZERS):
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in shapes])
        if name == "torch AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        else:
            optimizer = choice(compose(f"optim={name}").optim)(model)
        step = stepper(model, optimizer, gradients)
        step()  # the first step creates all bases and states
        held = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
        shared = optimizer.shared() if isinstance(optimizer, ShardedOptimizer) else []
        sizes[name] = sum(t.nbytes for t in (*held, *shared))
        calls[name] = step
    return {name: (t, sizes[name]) for name, t in interleaved(calls, rounds).items()}


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()

    return step


def compare_refreshes(m: int, n: int, rounds: int, svd: bool) -> dict[str, tuple[float, float]]:
    """Method to compute a basis → (median seconds, share of the gradient's energy kept)."""
    rank, k = min(m, n) // 4, min(m, n)
    generator = torch.Generator().manual_seed(0)
    # Singular values 1/√j on random directions: a slow decay, as for real gradients.
    gradient = torch.randn(m, k, generator=generator) * torch.arange(1, k + 1) ** -0.5
    gradient = gradient @ torch.randn(k, n, generator=generator) / k**0.5

    def alone(part: Tensor) -> Tensor:
        return part

    def chosen() -> Tensor:
        return top_columns(dct(gradient).square().sum(0), rank)

    ways: dict[str, Callable[[], Tensor]] = {
        "galore, randomized": lambda: randomized_basis(gradient, rank, generator_for(0, "bench"), alone),
        "galore, exact by Gram": lambda: svd_basis(gradient, rank, alone),
        "dct_adamw": chosen,
    }
    if svd:
        ways["published GaLore: SVD"] = lambda: published_basis(gradient, rank)
    energies = {}
    for name, way in ways.items():
        basis = way()
        if name == "dct_adamw":
            projected = dct(gradient)[:, basis]
        else:
            projected = (gradient if basis.shape[0] == n else gradient.T) @ basis
        energies[name] = float(projected.square().sum() / gradient.square().sum())
    calls = {name: (lambda way=way: None if way() is None else None) for name, way in ways.items()}
    return {name: (t, energies[name]) for name, t in interleaved(calls, rounds).items()}


def published_basis(gradient: Tensor, rank: int) -> Tensor:
    """As GaLore's code: the singular vectors of the smaller side, from the SVD of the whole gradient."""
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    return vt[:rank].T if gradient.shape[0] >= gradient.shape[1] else u[:, :rank]


def interleaved(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, with calls alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


if __name__ == "__main__":
    never_fail_to_print()
    main()
