"""Memory and time of activation checkpointing: none, whole blocks, and blocks that keep their bottlenecks.

The three variants train copies of one model in one process, alternating; memory is what a micro-batch's forward pass
saves for its backward pass, embeddings and logits included. Also prints the expected size of inputs and bottlenecks.

    python scripts/bench_recompute.py --model llama_60m --method cola
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_training import ours
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain import distributed
from lrtrain.config.compose import compose
from lrtrain.config.dtypes import compute_dtype
from lrtrain.core.streams import never_fail_to_print
from lrtrain.model.loss import next_token_loss
from lrtrain.model.structure import factorized_layers
from lrtrain.planning.kept import kept_bytes

MODES = {
    "none": ["train.recompute_every=0"],
    "inputs": ["train.recompute_every=1"],
    "bottleneck": ["train.recompute_every=1", "train.recompute_keep=bottleneck"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m", help="a name from conf/model")
    parser.add_argument("--method", default="cola", help="a name from conf/param")
    parser.add_argument("--sequences", type=int, default=4, help="per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each variant")
    parser.add_argument("--overrides", nargs="*", default=[], help="more overrides for lrtrain")
    args = parser.parse_args()

    world = distributed.start()
    common = [f"model={args.model}", f"param={args.method}", f"data.seq_len={args.seq_len}", *args.overrides]
    rows = torch.randint(compose(*common).model.vocab_size, (args.sequences, args.seq_len + 1))
    contenders = {mode: ours([*common, *overrides], rows, world) for mode, overrides in MODES.items()}
    kept = {mode: kept_bytes(lambda m=model: next_token_loss(m, rows)) for mode, (_, model) in contenders.items()}
    seconds = interleaved({mode: step for mode, (step, _) in contenders.items()}, args.rounds)

    table = Table(title=f"{args.model}, {args.method}, {args.sequences} × {args.seq_len} tokens", box=box.SIMPLE_HEAD)
    for column in ("keep", "activations", "blocks' part", "step time"):
        table.add_column(column, justify="left" if column == "keep" else "right")
    model = contenders["none"][1]
    tokens, dtype = args.sequences * args.seq_len, compute_dtype(compose(*common), world.device)
    inputs = model.config.num_hidden_layers * model.config.hidden_size * tokens * dtype.itemsize
    latents = sum(layer.rank for layer in factorized_layers(model).values()) * tokens * dtype.itemsize
    rest = kept["inputs"] - inputs
    for mode in MODES:
        ratio = seconds[mode] / seconds["none"]
        table.add_row(mode, mib(kept[mode]), mib(kept[mode] - rest), f"{ratio:.2f} × none")
    table.add_row("formula: inputs and bottlenecks", "", mib(inputs + latents), "")
    Console(width=100).print(table)
    distributed.stop()


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of one step of each variant, alternating, after a warm-up step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


if __name__ == "__main__":
    never_fail_to_print()
    main()
