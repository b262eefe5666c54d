"""The base class of all optimizers: AdamW for parameters that are not matrices, and state sharded like parameters.

A method is a subclass that defines which parameters it steps (`roles`, `takes`), its state for a parameter
(`new_state`), and the direction of a step (`direction`). It works on this process's rows; all communication goes
through `Rows`, so each method's file shows what it communicates.
"""

import math
from collections.abc import Collection, Hashable
from typing import Any, ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from lrtrain.config.ranges import Betas
from lrtrain.core.seeds import integer_seed
from lrtrain.distributed.sharding import local
from lrtrain.optim.adam import EpsConvention, adam_direction, fused_adamw
from lrtrain.optim.batches import Batch
from lrtrain.optim.groups import Decay, check_dimensions, parameter_groups
from lrtrain.optim.rounding import stochastic_round
from lrtrain.optim.rows import Rows, in_pieces, rows_like
from lrtrain.optim.stacks import Stack, present_stacks, stacked_states
from lrtrain.optim.withheld import unchanged_unless


class ShardedOptimizer(torch.optim.Optimizer):
    """AdamW on sharded parameters (plain tensors or DTensors sharded by rows), with a subclass's method for some.

    All state exists from the start, as tensors by parameter: DTensors (see `rows_like`) sharded like the parameter's
    rows, or replicated plain tensors, named in `replicated`. Arithmetic is float32; bfloat16 parameters are rounded
    stochastically. Random numbers are a function of (seed, name, step, entry), so they are the same on any number of
    processes. A method steps each matrix of a `Batch` separately: `p` is then one matrix, whole on this process.

    Args:
        model: its trainable parameters are stepped; may be on meta, to count state.

    Raises:
        ConfigError: if decay or eps_convention is unknown.
    """

    elementwise_shardable: ClassVar[bool] = False
    """Whether the optimizer can step any range of a parameter's entries (ZeRO), not only whole rows."""

    roles: ClassVar[frozenset[str]] = frozenset()
    """The roles (see `parameter_roles`) of the parameters that the method steps."""

    replicated: ClassVar[frozenset[str]] = frozenset()
    """The keys of replicated state."""

    elementwise: ClassVar[bool] = False
    """Whether the direction can be computed for some rows at a time, which needs less memory."""

    stacked: ClassVar[bool] = False
    """Whether `direction` can be computed for several matrices at a time; if it is elementwise it always can."""

    begins_by_gradient: ClassVar[bool] = False
    """Whether step 1 derives something from the gradient for later steps. Steps with a zero gradient (of A while B = 0)
    are then not counted until the first nonzero one."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: PositiveFloat,
        other_lr: NonNegativeFloat | None,
        lr_ratio: PositiveFloat,
        betas: Betas,
        eps: PositiveFloat,
        eps_convention: EpsConvention,
        weight_decay: NonNegativeFloat,
        decay: Decay,
        in_backward: bool,
        seed: int,
    ):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.eps_convention = eps_convention
        self.in_backward = in_backward
        self.seed = seed
        groups = parameter_groups(model, weight_decay, 1.0 if other_lr is None else other_lr / lr, lr_ratio, decay)
        super().__init__(groups, {"lr": lr})
        self.parameters = [p for group in self.param_groups for p in group["params"]]
        self.names: dict[Tensor, str] = {}
        self.rows: dict[Tensor, Rows] = {}
        """Names of parameters, and of the matrices of batches."""
        self.transposed: set[Tensor] = set()
        """The parameters whose matrices are stored as (in, out)."""
        self.own: set[Tensor] = set()
        """The parameters that the method steps."""
        self.batches: dict[Tensor, Batch] = {}
        """Those of these parameters that are batches of matrices."""
        self.place_in_batch: dict[Tensor, tuple[Tensor, int]] = {}
        """Matrix of a batch → (its parameter, its index among the matrices on this process)."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]
            for name, p in zip(group["names"], group["params"], strict=True):
                self.names[p], self.rows[p] = name, Rows(p)
                if group["transposed"]:
                    self.transposed.add(p)
                if self.takes(name, p, group["role"]):
                    check_dimensions(name, p, group["role"], type(self).__name__)
                    self.own.add(p)
                    if p.ndim == 3:
                        self._add_batch(name, p)
                self.initialize_state(p)
        self.stacks: dict[Tensor, Stack] = {} if in_backward else stacked_states(self)
        """The stacks of parameters, or matrices of batches, that are stepped at once with others."""

    def _add_batch(self, name: str, p: Tensor) -> None:
        batch = self.batches[p] = Batch(name, p, p in self.transposed)
        self.own.update(batch.matrices)
        self.names[batch.example], self.rows[batch.example] = f"{name}[0]", Rows(batch.example)
        for i, (matrix, its_name) in enumerate(zip(batch.matrices, batch.names, strict=True)):
            self.names[matrix], self.rows[matrix] = its_name, Rows(matrix)
            self.place_in_batch[matrix] = (p, i)

    @classmethod
    def check(cls, optim: dict[str, Any], dtype: str, shards: int) -> None:
        """Check that this optimizer supports the configuration, before anything is built.

        Args:
            optim, dtype: the configuration's `optim` and `train.dtype`.
            shards: number of processes that a parameter's state is sharded over.

        Raises:
            ConfigError: if it does not, naming the key and what would be right.
        """

    @classmethod
    def steps_ranges(cls, optim: dict[str, Any]) -> bool:
        """Whether the optimizer of a configuration can step any range of a parameter's entries (ZeRO)."""
        return cls.elementwise_shardable

    # --- what a method defines ----------------------------------------------------------------------------------------

    def takes(self, name: str, p: Tensor, role: str) -> bool:
        """Whether the method steps this parameter; AdamW steps the others."""
        return role in self.roles

    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        """The method's initial state for a parameter, without `step`.

        Raises:
            ConfigError: if the settings do not fit the parameter, naming the key.
        """
        raise NotImplementedError

    def direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The direction of a step for this process's rows, to be multiplied by −lr; updates the state.

        Args:
            stack: the parameters; if the method is `elementwise`, matrices come as one tall matrix or some rows of one.
            gradient: of this process's rows, float32, (rows, …), or (members, rows, …) if there are several; may be
                overwritten.
            state: this process's part, of the same form.
            step: from 1.
        """
        raise NotImplementedError

    def begin_step(self) -> None:
        """Called before the first parameter of a step, within the backward pass or not."""

    def step_jointly(self) -> Collection[Tensor]:
        """Step the parameters that are stepped together, before all others, and return them. Not called with updates in
        the backward pass, where gradients come one by one."""
        return ()

    def count_of(self, p: Tensor) -> Tensor:
        """The number of steps taken on a parameter."""
        return self.state[p]["step"]

    def involved(self, p: Tensor) -> Collection[Tensor]:
        """The parameters whose state a step on p may change."""
        return (p,)

    # --- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on every parameter that has a gradient."""
        self.begin_step()
        done = set(self.step_jointly())
        for group in self.param_groups:
            self._step_all([p for p in group["params"] if p.grad is not None and p not in done], group)

    @torch.no_grad()
    def step_one(self, p: Tensor, group: dict[str, Any], finite: Tensor | None = None) -> None:
        """Step one parameter, which has its gradient.

        Args:
            finite: a truth value on the device; if false, nothing but a count of steps on the CPU is changed.
        """
        if finite is None:
            return self._step_all([p], group)
        if self.fused(p):
            return self._step_fused([p], group, found_inf=(~finite).float())
        gradient = self.local_gradient(p)
        gradient.copy_(torch.where(finite, gradient, 0.0))  # decompositions refuse what is not finite
        states = [self.state[one] for one in self.involved(p)]
        kept = [local(p), *(local(value) for state in states for key, value in state.items() if key != "step")]
        with unchanged_unless(finite, kept):
            self._step_all([p], group)

    def _step_all(self, ready: list[Tensor], group: dict[str, Any]) -> None:
        for p in ready:
            if p in self.batches:
                self.batches[p].refresh()
        for stack in present_stacks(self, [item for p in ready if not self.fused(p) for item in self.items(p)]):
            self._step_stack(stack, group)
        if others := [p for p in ready if self.fused(p)]:
            self._step_fused(others, group)

    def items(self, p: Tensor) -> list[Tensor]:
        """What is stepped for a parameter: the parameter, or each matrix of a batch."""
        return self.batches[p].matrices if p in self.batches else [p]

    def alone(self, item: Tensor) -> Stack:
        """The stack of one parameter, or of one matrix of a batch."""
        return Stack([item], self.rows[item], self.local_state(item))

    def fused(self, p: Tensor) -> bool:
        """Whether torch's fused AdamW can step this parameter (one ε convention, no stochastic rounding)."""
        return p not in self.own and p.dtype == torch.float32 and self.eps_convention == "corrected"

    def _step_stack(self, stack: Stack, group: dict[str, Any]) -> None:
        own = stack.first in self.own
        counts = stack.state["step"]
        counts += 1
        step = int(counts.max())
        gradient = stack.joined([self.local_gradient(item) for item in stack.members])
        if step == 1 and self.begins_by_gradient and own and any(stack.are_zero(gradient)):
            if not stack.single:
                counts -= 1
                for item in stack.members:
                    self._step_stack(self.alone(item), group)
                return
            counts.zero_()  # so that the next step is the first again
        by_rows = not own or (self.elementwise and len(stack.shape) == 2)
        direction = self.direction if own else self.adamw_direction
        parts = {key: value for key, value in stack.state.items() if key != "step"}
        if not stack.single:
            if by_rows and len(stack.shape) > 1:  # one tall matrix
                gradient, parts = gradient.flatten(0, 1), {key: part.flatten(0, 1) for key, part in parts.items()}
            self._write(stack, direction(stack, gradient.float(), parts, step), group, step)
            return
        for rows in in_pieces(gradient) if by_rows else [slice(None)]:
            some = {key: part if key in self.replicated else part[rows] for key, part in parts.items()}
            self._write(stack, direction(stack, gradient[rows].float(), some, step), group, step, rows)

    def local_state(self, item: Tensor) -> dict[str, Tensor]:
        """This process's part of a parameter's state, or the state of one matrix of a batch."""
        if item not in self.place_in_batch:
            return {key: local(value) for key, value in self.state[item].items()}
        parameter, i = self.place_in_batch[item]
        return {key: local(value)[i] for key, value in self.state[parameter].items()}

    def local_gradient(self, item: Tensor) -> Tensor:
        """This process's part of a parameter's gradient, or the gradient of one matrix of a batch."""
        if item not in self.place_in_batch:
            assert item.grad is not None
            return local(item.grad)
        parameter, i = self.place_in_batch[item]
        return self.batches[parameter].gradient(i)

    def shape(self, p: Tensor) -> torch.Size:
        """(out, in) of a matrix."""
        return p.shape[::-1] if p in self.transposed else p.shape

    def adamw_direction(self, stack: Stack, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """AdamW's direction, from the moments `exp_avg` and `exp_avg_sq`."""
        return self.adam_step(gradient, state["exp_avg"], state["exp_avg_sq"], step)

    def adam_step(self, gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
        """`adam_direction` with this optimizer's settings; updates the moments in place."""
        return adam_direction(
            gradient, first, second, step, self.beta1, self.beta2, self.eps, eps_convention=self.eps_convention
        )

    def _step_fused(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None = None) -> None:
        fused_adamw(parameters, self.state, group, (self.beta1, self.beta2), self.eps, found_inf)

    def _write(self, stack: Stack, update: Tensor, group: dict[str, Any], step: int, rows: slice = slice(None)) -> None:
        """p ← (1 − lr·decay)·p − lr·update, for all of this process's rows, or some of a single member's."""
        kept = 1 - group["lr"] * group["weight_decay"]
        parts = [local(item)[rows] for item in stack.members]
        if parts[0].dtype != torch.float32:
            new = stack.joined(parts).float().mul_(kept)
            self.put(stack, new.add_(update.view_as(new), alpha=-group["lr"]), step, rows)
        elif stack.single:
            parts[0].mul_(kept).add_(update, alpha=-group["lr"])
        else:
            if kept != 1:
                torch._foreach_mul_(parts, kept)
            torch._foreach_add_(parts, [*update.view(len(parts), *parts[0].shape)], alpha=-group["lr"])

    def put(self, stack: Stack, new: Tensor, step: int, rows: slice = slice(None)) -> None:
        """p ← new (float32), for all of this process's rows, or some of a single member's; bfloat16 parameters are
        rounded stochastically."""
        parts = [local(item)[rows] for item in stack.members]
        if parts[0].dtype == torch.bfloat16:
            seeds = [integer_seed(self.seed, f"rounding of {self.names[item]} at {step}") for item in stack.members]
            new = stochastic_round(new, seeds, first_row=stack.rows.first + (rows.start or 0))
        torch._foreach_copy_(parts, [*stack.each(new)])

    # --- state -----------------------------------------------------------------------------------------------------

    def initialize_state(self, p: Tensor) -> None:
        """Give a parameter its initial state."""
        if p in self.batches:
            new = self.batches[p].new_state(self.new_state)
        elif p in self.own:
            # On the CPU, so that reading it does not synchronize with a GPU; fused AdamW needs it on the device.
            new = {"step": torch.zeros(()), **self.new_state(p)}
        else:
            moments = {key: rows_like(p, *p.shape[1:]) for key in ("exp_avg", "exp_avg_sq")}
            new = {"step": torch.zeros((), device=p.device if self.fused(p) else "cpu"), **moments}
        for key, value in self.state[p].items():
            local(value).copy_(local(new[key]))
        self.state[p] = self.state[p] or new

    def alike(self, p: Tensor) -> Hashable:
        """Parameters of a group are stepped at once if this is equal, besides their shape."""
        return None

    def entries(self, item: Tensor) -> int:
        """The number of entries of a parameter, or of a matrix of a batch, on each process."""
        return self.rows[item].most * math.prod(item.shape[1:])

    def named_state(self) -> dict[str, Tensor]:
        """`<parameter>.<key>` → state tensor (not a copy), to be saved, or filled in place."""
        return {f"{self.names[p]}.{key}": value for p, state in self.state.items() for key, value in state.items()}

    def state_bytes(self, shards: int = 1) -> int:
        """Bytes of all state except scalars, on one of `shards` processes with equally many rows."""
        found = 0
        for p, state in self.state.items():
            for key, value in state.items():
                if value.ndim:
                    found += value.nbytes // (1 if key in self.replicated and p not in self.batches else shards)
        return found + sum(t.nbytes for t in self.shared())

    def shared(self) -> list[Tensor]:
        """Tensors held besides the state and never saved, since a seed or formula determines them."""
        return []

    def metrics(self) -> dict[str, float]:
        """Metrics of the last step, by name within `optim/`, the same on all processes."""
        return {}
