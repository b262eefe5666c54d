"""Training throughput of lrtrain against a plain PyTorch loop over the same transformers model.

All contenders live in one process and take turns, so that a drifting machine slows them alike; what is printed is the
ratio of medians. The peer: the stock transformers model, its own loss, torch's AdamW, one batch after another.

    python scripts/bench_training.py --model llama_60m --methods dense lowrank sltrain
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain import distributed
from lrtrain.config import choice, compose, compute_dtype
from lrtrain.distributed import World
from lrtrain.model import architecture, factorized_layers, make_model, parameter_count, settle, training_flops
from lrtrain.throughput import matmul_peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m", help="a name from conf/model")
    parser.add_argument("--methods", nargs="+", default=["dense", "lowrank", "sltrain"], help="names from conf/param")
    parser.add_argument("--sequences", type=int, default=4, help="per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender")
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="more overrides for lrtrain, such as train.compile=true"
    )
    args = parser.parse_args()

    world = distributed.start()
    rows = torch.randint(compose(f"model={args.model}").model.vocab_size, (args.sequences, args.seq_len + 1))
    common = [f"model={args.model}", f"data.seq_len={args.seq_len}", *args.overrides]
    contenders = {"plain loop, dense": (plain_loop(common, rows), None)}
    for method in args.methods:
        contenders[f"lrtrain, {method}"] = ours([*common, f"param={method}"], rows, world)
    seconds = interleaved({name: step for name, (step, _) in contenders.items()}, args.rounds)

    tokens = args.sequences * args.seq_len
    peak = matmul_peak(world.device, torch.float32)
    table = Table(title=f"{args.model}, {tokens} tokens a step, {torch.get_num_threads()} threads", box=box.SIMPLE_HEAD)
    for column in ("", "parameters", "tokens/s", "× plain loop", "MFU"):
        table.add_column(column, justify="left" if not column else "right")
    base = seconds["plain loop, dense"]
    for name, (_, model) in contenders.items():
        flops = training_flops(model, args.seq_len).model if model else None
        table.add_row(
            name,
            f"{parameter_count(model) / 1e6:.1f} M" if model else "",
            f"{tokens / seconds[name]:,.0f}",
            f"{base / seconds[name]:.2f}",
            f"{flops * tokens / seconds[name] / peak:.0%}" if flops else "",
        )
    Console(width=100).print(table)
    distributed.stop()


def plain_loop(overrides: list[str], rows: torch.Tensor) -> Callable[[], None]:
    """One step of the loop that anyone would write first."""
    config = compose(*overrides)
    model = AutoModelForCausalLM.from_config(architecture(config.model.path, config.model.config)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss = model(input_ids=rows[:, :-1], labels=rows[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def ours(overrides: list[str], rows: torch.Tensor, world: World):
    """One step of lrtrain's engine, and its model."""
    config = compose(*overrides)
    model = make_model(config)
    dtype = compute_dtype(config, world.device)
    tokens = rows[:, 1:].numel()
    executions = settle(model, tokens, dtype, world.device)
    for name, layer in factorized_layers(model).items():
        layer.execution = executions.get(name)
    train = config.train
    engine = choice(config.engine)(
        world=world,
        dtype=dtype,
        compile=train.compile,
        recompute_every=train.recompute_every,
        recompute_keep=train.recompute_keep,
    )
    engine.prepare(model, 0, choice(config.optim))

    def step() -> None:
        engine.begin_step(0, 1e-3, 1.0, "global")
        loss = engine.forward_backward(rows, tokens)
        engine.clip_and_step(loss.item() / tokens)

    return step, engine.model


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of one step of each contender, which take turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
