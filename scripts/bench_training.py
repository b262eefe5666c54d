"""Training throughput and peak memory: lrtrain, a plain PyTorch loop over the same transformers model, and the methods
as published in that same loop.

Each contender has processes of its own, so that its peak memory is its own, and takes turns with the plain dense loop,
step by step, so that a drifting machine slows both alike. Ratios are medians of each turn's own ratio. Per contender:
tokens/s, × the plain dense loop, peak resident memory (of all its processes together), MFU: its layers' own FLOPs as a
share of this machine's best matrix product in the same dtype, the best that any contender on as many processes found.

    python scripts/bench_training.py --model llama_60m --methods dense lowrank sltrain
    python scripts/bench_training.py --model llama_1b --overrides model.config.num_hidden_layers=4

The plain loop: the stock model, its own loss, torch's AdamW. `plain METHOD` is what the paper prints (see
`bench_layers.py`), for GaLore a projection by an SVD of the whole gradient. `compiled dense` is the stock model,
compiled whole with its loss, and fused AdamW; `litgpt dense` is litgpt's GPT of the same shapes likewise (`pip install
"lrtrain[peers]"`, in an environment of its own: it wants an older huggingface_hub). `×2` is on two processes with one
thread each, half of the sequences in each: FSDP2 for lrtrain, DistributedDataParallel for the plain loop; it also takes
turns with itself on one process with two threads.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from published import PLAIN, PublishedGaLore

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.config.dtypes import compute_dtype
from lrtrain.core.streams import never_fail_to_print
from lrtrain.distributed.collectives import sum_over_ranks
from lrtrain.distributed.threads import usable_cores
from lrtrain.distributed.world import World, environment_rank, environment_world_size
from lrtrain.model.autotune import autotune_layers
from lrtrain.model.build import architecture, make_model
from lrtrain.model.counts import parameter_count
from lrtrain.model.flops import training_flops
from lrtrain.model.init import materialize
from lrtrain.model.structure import factorized_layers
from lrtrain.run.throughput import matmul_peak, peak_memory_gib

REFERENCE = "plain dense"
TWO = " ×2"
Step = Callable[[], None]


@dataclass
class Result:
    """What was measured of one contender."""

    contender: str
    parameters: int
    tokens_per_second: float
    ratio: float
    """× the plain dense loop."""
    peak_gib: float
    flops: float | None
    """Per second, of its layers."""
    matmul: float
    """FLOP/s of the best matrix product of its processes, together."""
    ratios: list[float]
    of_one: float | None = None
    """× the same on one process, of a contender on two."""
    mfu: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_60m", help="a name from conf/model")
    parser.add_argument("--methods", nargs="*", default=["dense", "lowrank", "sltrain", "galore", "lost", "cola"])
    parser.add_argument("--plain", nargs="*", default=["sltrain", "galore", "lost", "cola"], help="published forms")
    parser.add_argument("--peers", nargs="*", default=["compiled"], help="compiled, litgpt")
    parser.add_argument("--two", nargs="*", default=["dense"], help="methods of lrtrain on two processes")
    parser.add_argument("--sequences", type=int, default=8, help="per step")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender, after two that warm up")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, for all")
    parser.add_argument("--ours", nargs="*", default=["train.compile=true"], help="more of them, for lrtrain")
    parser.add_argument("--out", type=Path, default=Path("bench_training"), help="of the .json and .png, no suffix")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        serve(args)
        return

    names = [f"plain {method}" for method in args.plain]
    names += [f"{peer} dense" for peer in args.peers]
    names += [f"lrtrain {method}" for method in args.methods]
    names += [f"{REFERENCE}{TWO}"] * bool(args.two) + [f"lrtrain {method}{TWO}" for method in args.two]
    reference = Contender(REFERENCE)
    results: list[Result] = []
    taken: list[float] = []
    for name in names:
        alone = name.removesuffix(TWO)
        others = dict.fromkeys(who for who in (alone, name) if who != REFERENCE)
        crowd = {REFERENCE: reference} | {who: Contender(who) for who in others}
        turns = [{who: each.step() for who, each in crowd.items()} for _ in range(args.rounds + 2)][2:]
        taken += [turn[REFERENCE] for turn in turns]
        ratios = [turn[REFERENCE] / turn[name] for turn in turns]
        result = crowd[name].stop(args, [turn[name] for turn in turns], ratios)
        if alone != name:
            result.of_one = statistics.median(turn[alone] / turn[name] for turn in turns)
            if alone != REFERENCE:
                crowd[alone].stop(args, [1.0], [1.0])
        results.append(result)
        print(f"{name}: {result.ratio:.2f} × {REFERENCE}", file=sys.stderr, flush=True)
    results.insert(0, reference.stop(args, taken, [1.0]))
    for one in results:
        alike = [other for other in results if processes_of(other.contender) == processes_of(one.contender)]
        one.mfu = one.flops / max(other.matmul for other in alike) if one.flops else None
    print_results(results, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"arguments": {k: v for k, v in vars(args).items() if k != "out"}, "results": [asdict(r) for r in results]}
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    draw(results, f"{args.model} {' '.join(args.overrides)}", args.out.with_suffix(".png"))
    print(f"written: {args.out.with_suffix('.json')} {args.out.with_suffix('.png')}")


# --- processes that take turns -----------------------------------------------------------------------------------


def processes_of(name: str) -> int:
    return 2 if name.endswith(TWO) else 1


class Contender:
    """The processes of one contender, which wait to be told to take a step."""

    def __init__(self, name: str):
        self.name = name
        size = processes_of(name)
        with socket.socket() as free:
            free.bind(("", 0))
            group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--contender", name],
                env=os.environ
                | (group if size > 1 else {})
                | (
                    {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
                    if size > 1
                    else {}
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(size)
        ]

    def _ask(self, what: str) -> list[dict]:
        for process in self.processes:
            assert process.stdin is not None
            print(what, file=process.stdin, flush=True)
        answers = [process.stdout.readline() for process in self.processes if process.stdout is not None]
        if not all(answers):
            sys.exit(f"{self.name} ended early")
        return [json.loads(answer) for answer in answers]

    def step(self) -> float:
        """Seconds of one step."""
        return max(answer["seconds"] for answer in self._ask("step"))

    def stop(self, args: argparse.Namespace, seconds: list[float], ratios: list[float]) -> Result:
        """End the processes; what they took."""
        answers = self._ask("stop")
        for process in self.processes:
            process.wait()
        rate = args.sequences * args.seq_len / statistics.median(seconds)
        flops, peak = answers[0]["flops"], sum(answer["peak"] for answer in answers)
        return Result(
            self.name,
            answers[0]["parameters"],
            rate,
            statistics.median(ratios),
            sum(answer["gib"] for answer in answers),
            rate * flops if flops else None,
            peak,
            ratios,
        )


def serve(args: argparse.Namespace) -> None:
    """What a contender's process does: a step when told to."""
    answer, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    kind, method, *_ = args.contender.split()
    common = [f"model={args.model}", f"data.seq_len={args.seq_len}", *args.overrides]
    vocabulary = compose(*common).model.vocab_size
    shape = (args.sequences, args.seq_len + 1)
    rows = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    rows = rows.tensor_split(environment_world_size())[environment_rank()]
    if kind == "plain":
        step, model = plain_loop(common, method, rows)
    elif kind in ("compiled", "litgpt"):
        step, model = strong_peer(common, kind, rows)
    else:
        world = distributed.start()
        chosen = ["param=dense", "optim=galore"] if method == "galore" else [f"param={method}"]
        step, model = ours([*common, *args.ours, *chosen], rows, world)
    flops = training_flops(model, args.seq_len).model
    while (told := sys.stdin.readline().strip()) == "step":
        started = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - started}), file=answer, flush=True)
    gib = peak_memory_gib(torch.device("cpu"))  # before the peak is measured
    peak = matmul_peak(torch.device("cpu"), torch.float32) if told else 0.0
    told = {"gib": gib, "peak": peak, "flops": flops, "parameters": parameter_count(model)}
    print(json.dumps(told), file=answer, flush=True)
    os._exit(0)


# --- the contenders ----------------------------------------------------------------------------------------------


def plain_loop(overrides: list[str], method: str, rows: Tensor) -> tuple[Step, PreTrainedModel]:
    """One step of the loop that anyone would write first, on this process's share of the rows, and its model."""
    size = environment_world_size()
    torch.set_num_threads(max(1, len(usable_cores()) // size))
    dense = method in ("dense", "galore")
    config = compose(*overrides, f"param={'dense' if dense else method}")
    if dense:
        model = AutoModelForCausalLM.from_config(architecture(config.model.path, config.model.config)).float()
    else:
        model = make_model(config)
        materialize(model, 0, torch.device("cpu"))
        model.set_attn_implementation("sdpa")
        for layer in factorized_layers(model).values():
            form = PLAIN[method](layer).forward
            layer.forward = lambda x, form=form: form(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
    model.train()
    replica = model
    if size > 1:
        dist.init_process_group("gloo")  # not our start(), which sets the allocator too
        replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    projected = [p for n, p in model.named_parameters() if method == "galore" and "proj" in n]
    optimizer = torch.optim.AdamW([p for p in parameters if not any(p is q for q in projected)], lr=1e-3)
    galore = PublishedGaLore(projected, rank=config.model.recipe.rank, gap=200)

    def step() -> None:
        loss = replica(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        galore.step(1e-3)
        model.zero_grad()
        loss.item()

    return step, model


def strong_peer(overrides: list[str], kind: str, rows: Tensor) -> tuple[Step, PreTrainedModel]:
    """One step of a dense model compiled whole, with its loss, and fused AdamW; and transformers' of its shape."""
    torch.set_num_threads(len(usable_cores()))
    config = compose(*overrides, "param=dense")
    stock = AutoModelForCausalLM.from_config(architecture(config.model.path, config.model.config)).float().train()
    if kind == "litgpt":
        model: torch.nn.Module = litgpt_model(config.model.config, rows.shape[1] - 1)

        def loss_of(rows: Tensor) -> Tensor:
            logits = model(rows[:, :-1])
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    else:
        model = stock

        def loss_of(rows: Tensor) -> Tensor:
            return stock(input_ids=rows, labels=rows, use_cache=False).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    compiled = torch.compile(loss_of)

    def step() -> None:
        loss = compiled(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step, stock


def litgpt_model(shape: dict[str, Any], seq_len: int) -> torch.nn.Module:
    """litgpt's GPT of a LLaMA's shapes."""
    try:
        from litgpt import GPT, Config  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("--peers litgpt needs litgpt: pip install lrtrain[peers]")
    config = Config(
        name="peer",
        block_size=seq_len,
        n_layer=shape["num_hidden_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_attention_heads"],
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    return GPT(config).float().train()


def ours(overrides: list[str], rows: Tensor, world: World) -> tuple[Step, PreTrainedModel]:
    """One step of lrtrain's engine on this process's share of the rows, and its model."""
    config = compose(*overrides)
    model = make_model(config)
    dtype = compute_dtype(config, world.device)
    tokens = int(sum_over_ranks(rows[:, 1:].numel())[0])
    executions = autotune_layers(model, rows[:, 1:].numel(), dtype, world.device)
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
        engine.clip_and_step(loss / tokens)

    return step, engine.model


# --- showing -----------------------------------------------------------------------------------------------------


def print_results(results: list[Result], args: argparse.Namespace) -> None:
    tokens = args.sequences * args.seq_len
    table = Table(title=f"{args.model} {' '.join(args.overrides)}, {tokens} tokens a step", box=box.SIMPLE_HEAD)
    for column in ("", "parameters", "tokens/s", "× plain dense", "× on one process", "peak GiB", "MFU"):
        table.add_column(column, justify="left" if not column else "right")
    for result in results:
        table.add_row(
            result.contender,
            f"{result.parameters / 1e6:.1f} M",
            f"{result.tokens_per_second:,.0f}",
            f"{result.ratio:.2f}",
            f"{result.of_one:.2f}" if result.of_one else "",
            f"{result.peak_gib:.2f}",
            f"{result.mfu:.0%}" if result.mfu else "",
        )
    Console(width=100).print(table)


def draw(results: list[Result], title: str, path: Path) -> None:
    """Throughput and peak memory of all contenders, as multiples of the plain dense loop's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.4 * len(results) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = ["C0" if result.contender.startswith("lrtrain") else "C1" for result in results]
    names = [result.contender for result in results]
    left.barh(names, [result.ratio for result in results], color=colors)
    right.barh(names, [result.peak_gib / results[0].peak_gib for result in results], color=colors)
    for axis, what in ((left, "tokens/s"), (right, "peak memory")):
        axis.axvline(1, color="black", linewidth=1)
        axis.set(title=f"{what} / {REFERENCE}")
        axis.grid(axis="x", alpha=0.3)
    left.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    never_fail_to_print()
    main()
