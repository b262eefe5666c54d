"""Bytes of activations and temporary tensors over a forward and backward pass on the meta device, unit by unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel

from lrtrain.config.schema import Config
from lrtrain.engine.blocks import prepare_blocks
from lrtrain.engine.fsdp import sharded_units
from lrtrain.model.loss import TokenLoss
from lrtrain.planning.live_bytes import LiveBytes
from lrtrain.planning.split import split_alone

FLASH = "lrtrain_plan"


def flash_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention that saves the activations of a fused kernel; on meta torch would use the unfused one."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = fused(query, key, value, 0.0, True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLASH, flash_attention)

When = Literal["forward", "backward", "reduced"]


@dataclass(frozen=True)
class Moment:
    """A stage of the passes."""

    when: When
    """`reduced`: a unit's gradients are complete, and it is about to be sharded."""
    unit: int
    """Index among `sharded_units`; their number stands for the rest of the model."""
    live: int
    """Most bytes at a time, of all but parameters and buffers. Gradients live while their unit is at work."""
    done: tuple[int, ...]
    """The units whose gradients are complete."""
    before: int | None
    """The unit that was at work before, in the backward pass."""


def timeline(config: Config, model: PreTrainedModel, dtype: torch.dtype) -> tuple[list[Moment], int]:
    """The stages of one micro-batch's passes, and the bytes that the forward pass leaves to the backward pass.

    Changes the model (on meta): its dtype, attention and blocks; with `engine.tensor` its parameters are cut.
    """
    nn.Module.to(model, dtype)
    if model.config._attn_implementation != "eager":  # which keeps its matrices
        model.set_attn_implementation(FLASH)
    prepare_blocks(model, config.train.recompute_every, config.train.recompute_keep)
    loss = TokenLoss(model.train())
    if (degree := config.engine.get("tensor", 1)) > 1:
        split_alone(loss, degree)
    shape = (config.train.micro_batch_size, config.data.seq_len + 1)
    rows = torch.empty(shape, dtype=torch.int64, device="meta")
    passes = _Passes(model, loss)
    with passes:
        total = loss(rows)[0]
        saved = passes.memory.now
        total.backward()
        passes.end()
    return passes.moments, saved


class _Passes(TorchDispatchMode):
    """Watches forward and backward pass."""

    def __init__(self, model: PreTrainedModel, loss: TokenLoss):
        super().__init__()
        self.memory = LiveBytes(torch.device("meta"))
        self.moments: list[Moment] = []
        self.done: list[int] = []
        self.at_work: int | None = None
        self.model = model
        self.units = sharded_units(model)
        for tensor in (*model.parameters(), *model.buffers()):
            self.memory.leave_out(tensor)
        for i, unit in enumerate(self.units):
            called = loss.head if loss.head is not None and unit is model.get_output_embeddings() else unit
            called.register_forward_pre_hook(lambda *_, i=i: self._enter("forward", i))
            called.register_forward_hook(lambda _module, _args, out, i=i: self._forwarded(i, out))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.memory.see(tensor)
        return out

    def _enter(self, when: When, unit: int) -> None:
        self._leave()
        self.now: tuple[When, int, int | None] = when, unit, self.done[-1] if self.done else None
        self.memory.peak.clear()
        self.memory.enter("now")

    def _leave(self) -> None:
        """Record the stage that ends."""
        if hasattr(self, "now"):
            when, unit, before = self.now
            self.moments.append(Moment(when, unit, self.memory.peak["now"], tuple(self.done), before))

    def _forwarded(self, unit: int, out: Any) -> None:
        """After a unit's forward pass: wait for the gradient of its output."""
        first = next(t for t in tree_leaves(out) if isinstance(t, Tensor))
        if first.requires_grad:
            first.register_hook(lambda _: self._backward(unit))

    def _backward(self, unit: int) -> None:
        self._reduce()
        self._enter("backward", unit)
        self.at_work = unit

    def _reduce(self) -> None:
        """The gradients of the unit at work are complete: they are counted elsewhere from now on."""
        if self.at_work is None:
            return
        self._enter("reduced", self.at_work)
        self._leave()
        del self.now
        self._drop(self.units[self.at_work].parameters())
        self.done.append(self.at_work)
        self.at_work = None

    def _drop(self, parameters: Any) -> None:
        for p in parameters:
            p.grad = None

    def end(self) -> None:
        """After the backward pass: the last unit, and the rest of the model."""
        self._reduce()
        self._enter("reduced", len(self.units))
        self._leave()


def parameter_counts(model: PreTrainedModel, units: Sequence[nn.Module]) -> tuple[list[int], list[int]]:
    """The number of parameters and of trained ones of each unit, and of the rest of the model."""
    groups = [[*unit.parameters()] for unit in units]
    known = {id(p) for group in groups for p in group}
    groups.append([p for p in model.parameters() if id(p) not in known])
    counts = [sum(p.numel() for p in group) for group in groups]
    return counts, [sum(p.numel() for p in group if p.requires_grad) for group in groups]
