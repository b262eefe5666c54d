"""Bytes that a process receives from the others in one step, by engine and method: a table in markdown.

torchrun --nproc_per_node=2 scripts/wire_bytes.py [--model llama_60m] [--methods dense lowrank sltrain]
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.compose import compose
from lrtrain.core.streams import never_fail_to_print
from lrtrain.distributed.collectives import max_over_ranks
from lrtrain.model.build import make_model

ENGINES = {
    "fsdp": ["engine=fsdp"],
    "fsdp, bf16 sums": ["engine=fsdp", "engine.reduce_dtype=bf16"],
    "ddp": ["engine=ddp"],
    "ZeRO-1": ["engine=deepspeed", "engine.zero_stage=1"],
    "ZeRO-2": ["engine=deepspeed", "engine.zero_stage=2"],
    "ZeRO-3": ["engine=deepspeed", "engine.zero_stage=3"],
}


class ReceivedBytes(TorchDispatchMode):
    """Counts the bytes that a process receives in collectives, as the minimum that any algorithm needs."""

    def __init__(self) -> None:
        super().__init__()
        self.received = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.received += received(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))


def received(operator: str, args: tuple) -> int:
    """Bytes received in one collective: (n − 1)/n of the whole with n processes, twice that for an all-reduce."""
    share = 1 - 1 / dist.get_world_size()
    sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args[:2]]
    if "reduce_scatter" in operator:
        return round(share * sizes[1])
    if "allreduce" in operator:
        return round(2 * share * sizes[0])
    if "allgather" in operator:
        return round(share * sizes[0])
    return sizes[0] if dist.get_rank() else 0  # from or to process 0


def step_bytes(*overrides: str) -> int:
    """Bytes of the second step of a run (after all setup), the maximum over processes."""
    config = compose("train.dtype=fp32", *overrides)
    engine = choice(config.engine)(
        world=WORLD, dtype=torch.float32, compile=False, recompute_every=0, recompute_keep="inputs"
    )
    engine.prepare(make_model(config), 0, choice(config.optim))
    rows = torch.randint(1000, (1, 9), generator=torch.Generator().manual_seed(WORLD.dist_rank))
    counted = 0
    for step in range(2):
        with ReceivedBytes() as wire:
            engine.begin_step(step, 1e-3, 1.0, "global")
            loss = engine.forward_backward(rows, 8 * WORLD.size)
            engine.clip_and_step(loss.item())
        counted = wire.received
    return int(max_over_ranks(counted)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama_60m")
    parser.add_argument("--methods", nargs="+", default=["dense", "lowrank", "sltrain"])
    parser.add_argument("--engines", nargs="+", default=[*ENGINES], choices=[*ENGINES])
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, for all")
    arguments = parser.parse_args()
    lines = [f"| MiB a step | {' | '.join(arguments.methods)} |", "| --- |" + " --- |" * len(arguments.methods)]
    for engine in arguments.engines:
        found = [
            step_bytes(f"model={arguments.model}", f"param={method}", *ENGINES[engine], *arguments.overrides)
            for method in arguments.methods
        ]
        lines.append(f"| {engine} | {' | '.join(f'{n / 2**20:.2f}' for n in found)} |")
    if WORLD.main:
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    never_fail_to_print()
    WORLD = distributed.start()
    main()
    distributed.stop()
