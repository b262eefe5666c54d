"""Counts what the processes of a step send and hold, and writes it as JSON."""

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrtrain import distributed
from lrtrain.config.choice import choice
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.schema import Config
from lrtrain.distributed.sharding import local
from lrtrain.distributed.world import World
from lrtrain.model.build import make_model

KINDS = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced", "allreduce_": "replicated"}


class Counted(TorchDispatchMode):
    """Bytes that this process receives, by what they are for: of n processes each gets (n − 1)/n of the whole, twice
    for a sum that all get."""

    def __init__(self, tensor_group: str | None):
        super().__init__()
        self.tensor_group = tensor_group
        self.received = dict.fromkeys([*KINDS.values(), "latents"], 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and (kind := KINDS.get(func.__name__.partition(".")[0])):
            group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)
                         and "ProcessGroup" in str(a._type()))  # fmt: skip
            size = group.size()
            whole = max(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            times = 2 if kind == "replicated" else 1
            kind = "latents" if group.group_name == self.tensor_group else kind
            self.received[kind] += whole * (size - 1) / size * times
        return func(*args, **(kwargs or {}))


def allocated_at_most(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator gives out at a time while `step` runs, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measured(config: Config, world: World, peak: bool) -> dict[str, Any]:
    """One step: what was received and is held; with `peak`, of one more step the most at a time on the main process."""
    dtype = compute_dtype(config, world.device)
    every, keep = config.train.recompute_every, config.train.recompute_keep
    engine = choice(config.engine)(world=world, dtype=dtype, compile=False, recompute_every=every, recompute_keep=keep)
    engine.prepare(make_model(config), 0, choice(config.optim))
    rows = torch.randint(config.model.vocab_size, (config.train.micro_batch_size, config.data.seq_len + 1))
    passes = config.train.batch_size // (world.size * len(rows))

    def gradients() -> torch.Tensor:
        losses = [engine.forward_backward(rows, 1000, i + 1 == passes) for i in range(passes)]
        return losses[-1]

    engine.begin_step(0, 1e-3, 1.0, "global")
    engine.clip_and_step(gradients().item())  # this step also looks at the model once
    engine.begin_step(1, 1e-3, 1.0, "global")
    split = getattr(engine, "split_mesh", None)
    with Counted(split and split.get_group("tensor").group_name) as counted:
        loss = gradients()
    held = sum(local(p.grad).nbytes for p in engine.model.parameters() if p.grad is not None)
    engine.clip_and_step(loss.item())
    most = None
    if peak:
        engine.begin_step(2, 1e-3, 1.0, "global")
        most = allocated_at_most(gradients) if world.main else gradients().item()
    states = [t for s in engine.optimizer.state.values() for t in s.values() if t.ndim]
    return {
        "received": counted.received,
        "held": {
            "weights": sum(local(p).nbytes for p in engine.model.parameters()),
            "gradients": held,
            "optimizer": sum(local(t).nbytes for t in states),
        },
        "peak": most,
    }


def measure(jobs: list[Config], peaks: list[bool], out: Path) -> None:
    """The job of a crew: all of them, one after another; of some the peak too."""
    world = distributed.start()
    found = [measured(config, world, peak) for config, peak in zip(jobs, peaks, strict=True)]
    if world.main:
        out.write_text(json.dumps(found))
    distributed.stop()
