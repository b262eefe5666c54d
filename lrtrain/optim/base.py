"""The base class of all optimizers: AdamW for parameters that are not matrices, and state sharded like parameters.

A method is a subclass that defines which parameters it steps (`roles`, `takes`), its state for a parameter
(`new_state`), and the direction of a step (`direction`). It works on this process's rows; all communication goes
through `Rows`, so each method's file shows what it communicates.
"""

from collections.abc import Callable, Collection
from typing import Any, ClassVar, TypedDict

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from lrtrain.config.ranges import Betas
from lrtrain.core.seeds import integer_seed
from lrtrain.distributed.sharding import local
from lrtrain.errors import ConfigError
from lrtrain.optim.adam import EpsConvention, adam_direction
from lrtrain.optim.batches import Batch
from lrtrain.optim.groups import MATRICES, Decay, parameter_groups
from lrtrain.optim.rounding import stochastic_round
from lrtrain.optim.rows import Rows, in_pieces, rows_like


class Common(TypedDict):
    """The settings of all optimizers: keys of `optim`, explained in conf/common/optim.yaml."""

    lr: PositiveFloat
    other_lr: NonNegativeFloat | None
    lr_ratio: PositiveFloat
    betas: Betas
    eps: PositiveFloat
    eps_convention: EpsConvention
    weight_decay: NonNegativeFloat
    decay: Decay
    in_backward: bool
    seed: int


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
                    self._check_dimensions(name, p, group["role"])
                    self.own.add(p)
                    if p.ndim == 3:
                        self._add_batch(name, p)
                self.initialize_state(p)

    def _check_dimensions(self, name: str, p: Tensor, role: str) -> None:
        if p.ndim > 3 or (p.ndim < 2 and role in MATRICES):
            raise ConfigError(
                f"{name} of shape {'×'.join(map(str, p.shape))} has the role {role}, but is no matrix or batch of "
                f"matrices, which {type(self).__name__} steps; use optim=adamw, or another role"
            )

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

    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The direction of a step for this process's rows, to be multiplied by −lr; updates the state.

        Args:
            p: the parameter.
            gradient: of this process's rows, float32; may be overwritten.
            state: this process's part.
            step: from 1.
        """
        raise NotImplementedError

    def begin_step(self) -> None:
        """Called before the first parameter of a step, within the backward pass or not."""

    def step_jointly(self) -> Collection[Tensor]:
        """Step the parameters that are stepped together, before all others, and return them. Not called with updates in
        the backward pass, where gradients come one by one."""
        return ()

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
        if self._fused(p):
            return self._step_fused([p], group, found_inf=(~finite).float())
        gradient = self.local_gradient(p)
        gradient.copy_(torch.where(finite, gradient, 0.0))  # decompositions refuse what is not finite
        states = [self.state[one] for one in self.involved(p)]
        kept = [local(p), *(local(value) for state in states for key, value in state.items() if key != "step")]
        before = [part.clone() for part in kept]
        self._step_all([p], group)
        for part, old in zip(kept, before, strict=True):
            part.copy_(torch.where(finite, part, old))

    def _step_all(self, ready: list[Tensor], group: dict[str, Any]) -> None:
        for p in ready:
            if p in self.batches:
                self._step_batch(p, group)
            elif p in self.own:
                self._step_by(p, group, self.direction, self.elementwise and p.ndim == 2)
            elif not self._fused(p):
                self._step_by(p, group, self.adamw_direction, by_pieces=True)
        if others := [p for p in ready if self._fused(p)]:
            self._step_fused(others, group)

    def _fused(self, p: Tensor) -> bool:
        """Whether torch's fused AdamW can step this parameter (one ε convention, no stochastic rounding)."""
        return p not in self.own and p.dtype == torch.float32 and self.eps_convention == "corrected"

    def _step_by(self, p: Tensor, group: dict[str, Any], direction: Callable[..., Tensor], by_pieces: bool) -> None:
        """One step along `direction`, for all of this process's rows or for some at a time."""
        state, gradient = self.local_state(p), self.local_gradient(p)
        state["step"] += 1
        step = int(state["step"])
        parts = {key: value for key, value in state.items() if key != "step"}
        if step == 1 and self.begins_by_gradient and p in self.own and self._is_zero(p, gradient):
            state["step"].zero_()  # so that the next step is the first again
        for rows in in_pieces(gradient) if by_pieces else [slice(None)]:
            some = {key: part if key in self.replicated else part[rows] for key, part in parts.items()}
            self._write(p, direction(p, gradient[rows].float(), some, step), group, step, rows)

    def _step_batch(self, p: Tensor, group: dict[str, Any]) -> None:
        """One step on each matrix of a batch."""
        self.batches[p].refresh()
        for matrix in self.batches[p].matrices:
            self._step_by(matrix, group, self.direction, self.elementwise)

    def local_state(self, p: Tensor) -> dict[str, Tensor]:
        """This process's part of a parameter's state, or the state of one matrix of a batch."""
        if p not in self.place_in_batch:
            return {key: local(value) for key, value in self.state[p].items()}
        parameter, i = self.place_in_batch[p]
        return {key: local(value)[i] for key, value in self.state[parameter].items()}

    def local_gradient(self, p: Tensor) -> Tensor:
        """This process's part of a parameter's gradient, or the gradient of one matrix of a batch."""
        if p not in self.place_in_batch:
            assert p.grad is not None
            return local(p.grad)
        parameter, i = self.place_in_batch[p]
        return self.batches[parameter].gradient(i)

    def shape(self, p: Tensor) -> torch.Size:
        """(out, in) of a matrix."""
        return p.shape[::-1] if p in self.transposed else p.shape

    def _is_zero(self, p: Tensor, gradient: Tensor) -> bool:
        """Whether the gradient is zero in the rows of all processes; a collective."""
        return not self.rows[p].sum(gradient.any().float())

    def adamw_direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """AdamW's direction, from the moments `exp_avg` and `exp_avg_sq`."""
        return self.adam_step(gradient, state["exp_avg"], state["exp_avg_sq"], step)

    def adam_step(self, gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
        """`adam_direction` with this optimizer's settings; updates the moments in place."""
        return adam_direction(
            gradient, first, second, step, self.beta1, self.beta2, self.eps, eps_convention=self.eps_convention
        )

    def _step_fused(self, parameters: list[Tensor], group: dict[str, Any], found_inf: Tensor | None = None) -> None:
        states = [self.state[p] for p in parameters]
        fused_adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [],
            [s["step"] for s in states],
            found_inf=found_inf,
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self.eps,
            maximize=False,
        )

    def _write(self, p: Tensor, update: Tensor, group: dict[str, Any], step: int, rows: slice = slice(None)) -> None:
        """p ← (1 − lr·decay)·p − lr·update, for some of this process's rows."""
        part = local(p)[rows]
        new = part if part.dtype == torch.float32 else part.float()
        new.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        if new is not part:
            self.put(p, new, step, rows)

    def put(self, p: Tensor, new: Tensor, step: int, rows: slice = slice(None)) -> None:
        """p ← new (float32), for some of this process's rows; bfloat16 parameters are rounded stochastically."""
        part = local(p)[rows]
        if part.dtype == torch.bfloat16:
            seed = integer_seed(self.seed, f"rounding of {self.names[p]} at {step}")
            new = stochastic_round(new, seed, first_row=self.rows[p].first + (rows.start or 0))
        part.copy_(new)

    # --- state -----------------------------------------------------------------------------------------------------

    def initialize_state(self, p: Tensor) -> None:
        """Give a parameter its initial state."""
        if p in self.batches:
            self.state[p] = self.batches[p].new_state(self.new_state)
        elif p in self.own:
            # On the CPU, so that reading it does not synchronize with a GPU; fused AdamW needs it on the device.
            self.state[p] = {"step": torch.zeros(()), **self.new_state(p)}
        else:
            moments = {key: rows_like(p, *p.shape[1:]) for key in ("exp_avg", "exp_avg_sq")}
            self.state[p] = {"step": torch.zeros((), device=p.device if self._fused(p) else "cpu"), **moments}

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
