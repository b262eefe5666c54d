"""The plan of a run, without allocating anything: parameters, memory per process, FLOPs, tokens."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import hydra
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

from lrtrain.config.check import check
from lrtrain.config.choice import choice
from lrtrain.config.dtypes import compute_dtype
from lrtrain.config.schema import Config
from lrtrain.engine.blocks import prepare_blocks
from lrtrain.engine.fsdp import sharded_units
from lrtrain.layers.base import FactorizedLinear
from lrtrain.model.build import make_model
from lrtrain.model.counts import dense_parameter_count, parameter_count, trainable_count
from lrtrain.model.flops import training_flops
from lrtrain.model.loss import CHUNK, TokenLoss, next_token_loss

FP32 = 4  # bytes
FLASH = "lrtrain_plan"


def flash_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that saves the activations of a fused kernel; on meta torch would use the unfused one."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = fused(query, key, value, 0.0, True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLASH, flash_attention)


@dataclass(frozen=True)
class Memory:
    """Bytes on one process."""

    weights: int
    gradients: int
    optimizer: int
    supports: int
    gathered: int
    """One block's (or the head's) whole parameters and gradients in use and on their way, and the root's; of a process
    that shares with none, the head's gradient, which is made while all activations are there."""
    activations: int
    recomputed: int
    """One block's activations when it is run again, as far as they are more than the logits, which are gone by then."""
    not_at_once: int
    """≤ 0: with one micro-batch per step, activations are freed while gradients are allocated."""

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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config, device)
    kinds = parameters_by_kind(model)
    ours, dense, trained = parameter_count(model), dense_parameter_count(model), trainable_count(model)
    memory = memory_per_process(config, model, dtype, world_size)
    flops = training_flops(model, config.data.seq_len)
    tokens = config.train.batch_size * config.data.seq_len

    table = Table(
        title=f"{config.model.name} · {config.param['name']} · {world_size} processes",
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
    table.add_row("[bold]FLOPs per token, forward and backward", f"[bold]{flops.model / 1e9:,.3f} G")
    table.add_row("  dense model, for comparison", f"{flops.dense_equivalent / 1e9:,.3f} G")
    table.add_row("[bold]steps", f"[bold]{config.train.steps:,}")
    table.add_row("  tokens per step", f"{tokens:,}")
    table.add_row("  tokens in all", f"{tokens * config.train.steps:,}")
    table.add_row("  FLOPs in all", f"{flops.model * tokens * config.train.steps:.3g}")
    Console(width=100).print(table)


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
    """Weights, gradients and optimizer state as sharded by the engine; supports; gathered parameters; activations."""
    own = next(model.parameters()).dtype.itemsize
    parameters, trainable = parameter_count(model), trainable_count(model)
    units = sharded_units(model)
    spread = hydra.utils.get_object(config.engine["_target_"]).spread(config, world_size)
    # A unit is gathered in one buffer and copied out of it; its gradient is copied into one and reduced into shards.
    copies = max(2 * parameter_count(unit) + (1 + 1 / spread.gradients) * trainable_count(unit) for unit in units)
    rest = parameters - sum(map(parameter_count, units))
    wrapped = world_size > 1 or dtype.itemsize != own
    held = max(map(trainable_count, units)) if config.optim["in_backward"] else trainable
    masters = own * trainable // spread.states if spread.masters else 0  # the float32 parameters that are stepped
    weights = (dtype.itemsize if spread.masters else own) * parameters // spread.parameters
    supports = sum(
        b.numel() * b.element_size() for m in model.modules() if isinstance(m, FactorizedLinear) for b in m.buffers()
    )
    head = cast(nn.Module, model.get_output_embeddings())
    single = config.train.batch_size == config.train.micro_batch_size * world_size
    # The embeddings' gradient of the previous micro-batch is still being reduced.
    late = 0 if single else trainable_count(model.get_input_embeddings())
    gathered = int(dtype.itemsize * (copies + 2 * rest + late)) if wrapped else own * trainable_count(head)
    gradients, optimizer = own * held // spread.gradients, choice(config.optim)(model).state_bytes(spread.states)
    kept, block, logits = activation_bytes(config, model, dtype)
    recomputed = max(0, block - logits)
    when_most = kept + logits + recomputed + (0 if wrapped else gathered)
    return Memory(
        weights=weights + masters,
        gradients=gradients,
        optimizer=optimizer,
        supports=supports,
        gathered=gathered,
        activations=kept + logits,
        recomputed=recomputed,
        not_at_once=-min(gradients, when_most - block) if single else 0,
    )


def activation_bytes(config: Config, model: PreTrainedModel, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes that one micro-batch's forward pass saves for its backward pass, bytes of a recomputed block, and bytes of
    the logits held at a time.

    Runs the forward pass on the meta device.
    """
    nn.Module.to(model, dtype)
    if model.config._attn_implementation != "eager":  # which keeps its matrices
        model.set_attn_implementation(FLASH)
    shape = (config.train.micro_batch_size, config.data.seq_len + 1)
    rows = torch.empty(shape, dtype=torch.int64, device="meta")
    whole = kept_bytes(lambda: next_token_loss(model.train(), rows))
    again = prepare_blocks(model, config.train.recompute_every, config.train.recompute_keep)
    kept = kept_bytes(lambda: next_token_loss(model.train(), rows)) if again else whole
    block = (whole - kept) // again if again else 0
    tokens, vocabulary = shape[0] * config.data.seq_len, model.config.get_text_config().vocab_size
    if TokenLoss(model).head is None:
        return kept, block, FP32 * tokens * vocabulary  # the logits' gradient
    head = sum(p.nbytes for p in cast(nn.Module, model.get_output_embeddings()).parameters() if p.requires_grad)
    narrow = 2 * dtype.itemsize if dtype.itemsize < FP32 else 0  # logits and their gradient besides float32 ones
    return kept - head, block, (FP32 + narrow) * min(tokens, CHUNK) * vocabulary  # head: counted with the gradients


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages created by `forward` that live as long as its result: saved for the backward pass by
    autograd or checkpointing."""
    with _Storages() as storages:
        result = forward()
    own = result.untyped_storage().nbytes()
    return sum(size for storage, size in storages.made.values() if not storage.expired()) - own


class _Storages(TorchDispatchMode):
    """Records the storages that operators create, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out
