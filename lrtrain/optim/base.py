"""What the optimizers share: AdamW for what is not a matrix, rows that stay where they are, exact states.

A method is a subclass: it says which parameters it takes (`takes`), what it keeps for one (`new_state`), and what the
next step of one is (`direction`). It works on this process's rows alone; whatever needs the others' goes through
`Rows`, so what is communicated can be read off the method's own file.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as fused_adamw

from lrtrain.initialize import integer_seed
from lrtrain.layers.base import local
from lrtrain.optim.adam import adam_direction
from lrtrain.optim.groups import parameter_groups
from lrtrain.optim.rounding import stochastic_round
from lrtrain.optim.rows import Rows, in_pieces, rows_like


class Common(TypedDict):
    """The settings that all optimizers have: keys of `optim`, explained in conf/optim/base.yaml."""

    lr: float
    other_lr: float | None
    lr_ratio: float
    betas: list[float]
    eps: float
    weight_decay: float
    in_backward: bool


class ShardedOptimizer(torch.optim.Optimizer, ABC):
    """Steps on the shards of parameters (plain tensors or DTensors with rows sharded).

    All state exists from the start, as tensors by parameter: DTensors (see `rows_like`) that follow the parameter's
    rows, or plain tensors that are the same on all processes, named in `replicated`. All arithmetic is float32;
    bfloat16 parameters are rounded stochastically, by noise that is a function of (step, name, shard).

    Args:
        model: whose trainable parameters are stepped; may be on meta, to be measured.
    """

    replicated: ClassVar[frozenset[str]] = frozenset()
    """The keys of states that every process holds whole."""

    elementwise: ClassVar[bool] = False
    """Whether the direction of a matrix can be had from some of its rows at a time, which needs less memory."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        other_lr: float | None,
        lr_ratio: float,
        betas: list[float],
        eps: float,
        weight_decay: float,
        in_backward: bool,
    ):
        self.beta1, self.beta2 = betas
        self.eps = eps
        self.in_backward = in_backward
        groups = parameter_groups(model, weight_decay, 1.0 if other_lr is None else other_lr / lr, lr_ratio)
        super().__init__(groups, {"lr": lr})
        self.names: dict[Tensor, str] = {}
        self.rows: dict[Tensor, Rows] = {}
        for group in self.param_groups:
            group["lr"] = lr * group["lr_factor"]
            for name, p in zip(group["names"], group["params"], strict=True):
                self.names[p], self.rows[p] = name, Rows(p)
                self.begin_anew(p, group["role"])

    # --- what a method says ----------------------------------------------------------------------------------------

    @abstractmethod
    def takes(self, name: str, p: Tensor, role: str) -> bool:
        """Whether the method is for this parameter; AdamW steps the others.

        Raises:
            ConfigError: if it should be and cannot, naming the key.
        """

    @abstractmethod
    def new_state(self, p: Tensor) -> dict[str, Tensor]:
        """What the method keeps for a parameter, besides `step`, before its first step."""

    @abstractmethod
    def direction(self, p: Tensor, gradient: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """The step on this process's rows, to be scaled by the negative learning rate; changes the state.

        Args:
            p: the parameter.
            gradient: of the rows here, float32; may be overwritten.
            state: the local parts.
            step: from 1.
        """

    def begin_step(self) -> None:
        """Before the first parameter of a step, within the backward pass or not."""

    def step_jointly(self) -> Collection[Tensor]:
        """Before all others, the steps on parameters that are taken together, but not within the backward pass, where
        gradients come one by one; returns these parameters."""
        return ()

    # --- stepping --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on every parameter that has a gradient."""
        self.begin_step()
        done = set(self.step_jointly())
        for group in self.param_groups:
            ready = [p for p in group["params"] if p.grad is not None and p not in done]
            own = {p for p in ready if self.takes(self.names[p], p, group["role"])}
            for p in ready:
                if p in own:
                    self._step_own(p, group)
            self._step_others([p for p in ready if p not in own], group)

    @torch.no_grad()
    def step_one(self, p: Tensor, group: dict[str, Any]) -> None:
        """The step on one parameter, now that it has its gradient."""
        if self.takes(self.names[p], p, group["role"]):
            self._step_own(p, group)
        else:
            self._step_others([p], group)

    def _step_own(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        state["step"] += 1
        step = int(state["step"])
        parts = {key: local(value) for key, value in state.items() if key != "step"}
        gradient = local(p.grad)
        pieces = in_pieces(gradient) if self.elementwise and p.ndim == 2 else [slice(None)]
        for rows in pieces:
            some = {key: part if key in self.replicated else part[rows] for key, part in parts.items()}
            self._write(p, self.direction(p, gradient[rows].float(), some, step), group, step, rows)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        whole = [p for p in parameters if p.dtype == torch.float32]
        if whole:
            states = [self.state[p] for p in whole]
            fused_adamw(
                [local(p) for p in whole],
                [local(p.grad) for p in whole if p.grad is not None],
                [local(s["exp_avg"]) for s in states],
                [local(s["exp_avg_sq"]) for s in states],
                [],
                [s["step"] for s in states],
                fused=True,
                amsgrad=False,
                beta1=self.beta1,
                beta2=self.beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                maximize=False,
            )
        for p in parameters:
            if p.dtype != torch.float32:
                assert p.grad is not None
                state = self.state[p]
                state["step"] += 1
                step = int(state["step"])
                first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
                gradient = local(p.grad)
                for piece in in_pieces(first):
                    update = adam_direction(
                        gradient[piece].float(), first[piece], second[piece], step, self.beta1, self.beta2, self.eps
                    )
                    self._write(p, update, group, step, piece)

    def _write(self, p: Tensor, update: Tensor, group: dict[str, Any], step: int, rows: slice = slice(None)) -> None:
        """p ← (1 − lr·decay)·p − lr·update, for some of the rows here."""
        part = local(p)[rows]
        new = part if part.dtype == torch.float32 else part.float()
        new.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        if new is not part:
            self.put(p, new, step, rows)

    def put(self, p: Tensor, new: Tensor, step: int, rows: slice = slice(None)) -> None:
        """p ← new (float32), for some of the rows here; rounded stochastically to bfloat16."""
        part = local(p)[rows]
        if part.dtype == torch.bfloat16:
            seed = integer_seed(step, f"{self.names[p]}/rows {self.rows[p].first + (rows.start or 0)}")
            new = stochastic_round(new, torch.Generator(part.device).manual_seed(seed))
        part.copy_(new)

    # --- state -----------------------------------------------------------------------------------------------------

    def begin_anew(self, p: Tensor, role: str) -> None:
        """Give a parameter the state that it has before its first step."""
        if self.takes(self.names[p], p, role):
            # On the CPU, where it can be read without waiting for a GPU; fused AdamW wants its own on the device.
            self.state[p] = {"step": torch.zeros(()), **self.new_state(p)}
        else:
            moments = {key: rows_like(p, *p.shape[1:]) for key in ("exp_avg", "exp_avg_sq")}
            on_device = p.dtype == torch.float32
            self.state[p] = {"step": torch.zeros((), device=p.device if on_device else "cpu"), **moments}

    def named_state(self) -> dict[str, Tensor]:
        """`<parameter>.<key>` → state, the tensors themselves: to be saved, or to be filled in place."""
        return {f"{self.names[p]}.{key}": value for p, state in self.state.items() for key, value in state.items()}

    def state_bytes(self, shards: int = 1) -> int:
        """Bytes of all state, scalars aside, on one of `shards` processes that share the rows evenly."""
        found = 0
        for state in self.state.values():
            for key, value in state.items():
                if value.ndim:
                    found += value.nbytes // (1 if key in self.replicated else shards)
        return found + sum(t.nbytes for t in self.shared())

    def shared(self) -> list[Tensor]:
        """What is held besides the state and never saved, since a seed or a formula gives it back."""
        return []
