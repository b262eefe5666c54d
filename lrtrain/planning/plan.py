"""The plan of a run, without allocating anything: parameters, memory per process, FLOPs, tokens."""

from collections import defaultdict
from dataclasses import dataclass

import hydra
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.dtypes import DTYPES, compute_dtype
from lrtrain.config.schema import Config, GPUConfig
from lrtrain.core.words import processes
from lrtrain.engine.fsdp import sharded_units
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, parameter_count, trainable_count
from lrtrain.model.flops import training_flops
from lrtrain.planning.sharding import Sharding
from lrtrain.planning.timeline import parameter_counts, timeline


@dataclass(frozen=True)
class Memory:
    """Bytes on one process."""

    weights: int
    gradients: int
    optimizer: int
    supports: int
    gathered: int
    """Unsharded parameters of the unit at work, and buffers in which parameters and gradients are on their way."""
    activations: int
    """Activations, temporary tensors, and unsharded gradients of the unit at work."""
    not_at_once: int
    """≤ 0: gradients that are not there yet (or no longer) when all this is at its most."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def parts(self) -> dict[str, int]:
        """The parts of the memory by description."""
        return {name.replace("_", " "): size for name, size in vars(self).items() if size}


def print_plan(config: Config, world_size: int) -> None:
    """Print the plan of `dry_run=true`."""
    check(config, world_size)
    model = make_model(config)
    on_gpu = config.gpu is not None or torch.cuda.is_available()
    dtype = compute_dtype(config, torch.device("cuda" if on_gpu else "cpu"))
    kinds = parameters_by_kind(model)
    ours, dense, trained = parameter_count(model), dense_parameter_count(model), trainable_count(model)
    memory = memory_per_process(config, model, dtype, world_size)
    flops = training_flops(model, config.data.seq_len)
    tokens = config.train.batch_size * config.data.seq_len

    arithmetic = next(name for name, one in DTYPES.items() if one == dtype)
    on = f"{config.gpu.name}, " if config.gpu else ""
    table = Table(
        title=f"{config.model.name} · {config.param['name']} · {processes(world_size)}, {on}{arithmetic}",
        box=box.SIMPLE,
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_row("[bold]parameters", f"[bold]{ours / 1e6:,.2f} M")
    for kind, count in kinds.items():
        table.add_row(f"  {kind}", f"{count / 1e6:,.2f} M")
    if trained < ours:
        table.add_row("  trained of them", f"{trained / 1e6:,.2f} M")
    table.add_row("  dense model, for comparison", f"{dense / 1e6:,.2f} M  ({ours / dense:.0%})")
    table.add_row("[bold]memory per process", f"[bold]{memory.total / 2**30:,.2f} GiB")
    for part, size in memory.parts().items():
        table.add_row(f"  {part}", f"{size / 2**30:,.3f} GiB")
    if config.gpu:
        table.add_row(f"  of the {config.gpu.memory:g} GiB of {config.gpu.name}", share_of(memory, config.gpu))
    table.add_row("[bold]FLOPs per token, forward and backward", f"[bold]{flops.model / 1e9:,.3f} G")
    table.add_row("  dense model, for comparison", f"{flops.dense_equivalent / 1e9:,.3f} G")
    table.add_row("[bold]steps", f"[bold]{config.train.steps:,}")
    table.add_row("  tokens per step", f"{tokens:,}")
    table.add_row("  tokens in all", f"{tokens * config.train.steps:,}")
    table.add_row("  FLOPs in all", f"{flops.model * tokens * config.train.steps:.3g}")
    Console(width=100).print(table)


def share_of(memory: Memory, gpu: GPUConfig) -> str:
    """The share of a GPU's memory that a process takes, and whether it fits."""
    share = memory.total / 2**30 / gpu.memory
    return f"{share:.0%}" if share <= 1 else f"[bold red]{share:.0%}: does not fit"


def parameters_by_kind(model: nn.Module) -> dict[str, int]:
    """Number of parameters by kind: the roles of factorized layers, linear layers, embeddings and the rest."""
    counts: defaultdict[str, int] = defaultdict(int)
    seen: set[int] = set()
    for module in model.modules():
        factorized = isinstance(module, FactorizedLinear)
        for name, parameter in module.named_parameters(recurse=factorized):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if factorized:
                kind = module.roles[name].replace("_", " ")
            elif isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif isinstance(module, nn.Linear):
                kind = "dense linears"
            elif parameter.ndim == 3:
                kind = "dense experts"
            else:
                kind = "norms and others"
            counts[kind] += parameter.numel()
    return dict(counts)


def memory_per_process(config: Config, model: PreTrainedModel, dtype: torch.dtype, world_size: int) -> Memory:
    """Bytes at the moment of a step when they are most. Runs the passes on the meta device, and changes the model."""
    own = next(model.parameters()).dtype.itemsize
    parameters, trainable = parameter_count(model), trainable_count(model)
    spread = hydra.utils.get_object(config.engine["_target_"]).spread(config, world_size)
    masters = own * trainable // spread.states if spread.masters else 0  # the float32 parameters that are stepped
    weights = (dtype.itemsize if spread.masters else own) * parameters // spread.parameters
    supports = sum(
        b.numel() * b.element_size() for m in model.modules() if isinstance(m, FactorizedLinear) for b in m.buffers()
    )
    in_backward = config.optim["in_backward"]
    by_unit = parameter_counts(model, sharded_units(model))[1]
    held = max(by_unit) if in_backward else trainable
    gradients, optimizer = own * held // spread.gradients, choice(config.optim)(model).state_bytes(spread.states)
    moments, _ = timeline(config, model, dtype)
    sharding = Sharding.of(config, model, dtype, own, world_size, spread, by_unit)
    gathered, activations, there = max(
        ((sharding.bytes(at), at.live, min(gradients, sharding.gradients(at))) for at in moments), key=sum
    )
    if gathered + activations + there < gradients:  # the optimizer's step needs more
        gathered, activations, there = 0, 0, gradients
    return Memory(weights + masters, gradients, optimizer, supports, gathered, activations, there - gradients)
