"""Any class of torch.optim, or another subclass of torch.optim.Optimizer, on this process's part of each parameter."""

import pkgutil
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lrtrain.core.seeds import generator_for
from lrtrain.distributed.flat_shard import FlatShard
from lrtrain.distributed.sharding import local
from lrtrain.errors import ConfigError
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.optim.groups import Decay

TAKEN = "steps_taken"
"""The key of the number of steps in a parameter's state: before the first one the class has made no state yet."""


class TorchClass(ShardedOptimizer):
    """Every parameter is stepped by an instance of `of`, which sees this process's part of it as a plain tensor.

    That is exact for classes that treat each entry by itself (see `is_elementwise`); others need whole parameters.

    Args:
        of: import path of the class.
        args: more arguments of its constructor; lr and weight_decay come from the other keys.

    Raises:
        ConfigError: if the class cannot step one of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        of: str,
        args: dict[str, Any] | None,
        lr: PositiveFloat,
        other_lr: NonNegativeFloat | None,
        lr_ratio: PositiveFloat,
        weight_decay: NonNegativeFloat,
        decay: Decay,
        in_backward: bool,
        seed: int,
    ):
        self.of, self.args = of, args or {}
        self.kind = class_at(of)
        adamw: Any = {"betas": [0.9, 0.999], "eps": 1e-8, "eps_convention": "corrected"}  # which steps nothing here
        ours: Any = {"lr": lr, "other_lr": other_lr, "lr_ratio": lr_ratio, "weight_decay": weight_decay, "decay": decay}
        super().__init__(model, **ours, **adamw, in_backward=in_backward, seed=seed)

    @classmethod
    def check(cls, optim: dict[str, Any], dtype: str, shards: int) -> None:
        of, args = optim["of"], optim["args"] or {}
        has_decay = "weight_decay" in trial(of, args, [torch.ones(4, 6)])[1].defaults
        if optim["weight_decay"] and not has_decay:
            raise ConfigError(f"optim.weight_decay={optim['weight_decay']} has no effect: optim.of={of} has none")
        if shards > 1 and not cls.steps_ranges(optim):
            raise ConfigError(
                f"optim.of={of} looks at more than one entry at a time, and parameters are sharded over {shards} "
                f"processes; use engine=ddp, which keeps them whole"
            )
        if dtype == "bf16_sr":
            raise ConfigError(f"train.dtype=bf16_sr rounds stochastically, which optim.of={of} does not; use bf16")

    @classmethod
    def steps_ranges(cls, optim: dict[str, Any]) -> bool:
        return is_elementwise(optim["of"], tuple(sorted((optim["args"] or {}).items(), key=str)))

    # --- state -----------------------------------------------------------------------------------------------------

    def initialize_state(self, p: Tensor) -> None:
        """State of the form that the class gives it: found by a step of zeros, with a gradient of zeros."""
        part = local(p).detach()
        zeros = torch.zeros([2] * part.ndim) if part.is_meta else torch.zeros_like(part)  # classes may read values
        zeros.grad = torch.zeros_like(zeros)
        try:
            inner = self.kind([zeros], lr=self.defaults["lr"], **self.args)
            inner.step()
        except Exception as error:  # whatever the class raises
            raise ConfigError(f"optim.of={self.of} cannot step {self.names[p]}: {first_line(error)}") from error
        state = inner.state[zeros]
        if part.is_meta:
            state = {k: torch.empty_like(part, dtype=v.dtype) if v.ndim else v for k, v in state.items()}
        self.state[p] = {TAKEN: torch.zeros(()), **self._sharded(p, state)}

    def _sharded(self, p: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
        """A state of this process's part, as one of the parameter."""
        part = local(p)
        return {key: like(p, value) if value.shape == part.shape else value for key, value in state.items()}

    def alike(self, p: Tensor) -> Hashable:
        """Each parameter is stepped alone, by an instance of its own."""
        return p

    # --- stepping --------------------------------------------------------------------------------------------------

    def count_of(self, p: Tensor) -> Tensor:
        return self.state[p][TAKEN]

    @torch.no_grad()
    def step_one(self, p: Tensor, group: dict[str, Any], finite: Tensor | None = None) -> None:
        """Waits for the device to know whether `finite`, since the class may replace its state."""
        if finite is None or finite.item():
            self._step_all([p], group)

    @torch.no_grad()
    def _step_all(self, ready: list[Tensor], group: dict[str, Any]) -> None:
        for p in ready:
            part = local(p).detach()
            part.grad = self.local_gradient(p)
            inner = self.kind([part], lr=group["lr"], **self.args)
            if "weight_decay" in inner.defaults:
                inner.param_groups[0]["weight_decay"] = group["weight_decay"]
            state = self.state[p]
            taken = state[TAKEN]
            if taken:
                inner.state[part] = {key: local(value) for key, value in state.items() if key != TAKEN}
            inner.step()
            self.state[p] = {TAKEN: taken + 1, **self._sharded(p, inner.state[part])}


def class_at(path: str) -> Callable[..., torch.optim.Optimizer]:
    """The subclass of torch.optim.Optimizer at an import path.

    Raises:
        ConfigError: if there is none.
    """
    try:
        found = pkgutil.resolve_name(path)
    except Exception as error:  # importing a module may raise anything
        raise ConfigError(f"optim.of={path} cannot be imported: {first_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optim.of={path} is no subclass of torch.optim.Optimizer, such as torch.optim.NAdam")
    if issubclass(found, ShardedOptimizer):
        raise ConfigError(f"optim.of={path} is an optimizer of lrtrain; name it by optim._target_ in a yaml of its own")
    return found


@cache
def is_elementwise(of: str, args: tuple[tuple[str, Any], ...]) -> bool:
    """Whether a class steps each entry of a parameter independently of the others: whether a matrix and ranges of its
    entries take the same steps."""
    matrix = torch.randn(4, 6, generator=generator_for(0, "a matrix"))
    whole, _ = trial(of, dict(args), [matrix])
    try:
        ranges, _ = trial(of, dict(args), [*matrix.flatten().split([10, 14])])
    except ConfigError:  # it takes matrices only
        return False
    return torch.allclose(torch.cat(ranges), whole[0].flatten(), rtol=1e-5, atol=1e-7)


def trial(of: str, args: dict[str, Any], parts: list[Tensor]) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Tensors after three steps along fixed gradients, and the optimizer.

    Raises:
        ConfigError: if the class cannot take them, or keeps state where checkpoints do not look for it.
    """
    parts = [part.clone() for part in parts]
    try:
        optimizer = class_at(of)(parts, lr=1e-2, **args)
        before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        for step in range(3):
            flat = torch.randn(sum(part.numel() for part in parts), generator=generator_for(step, "gradients"))
            for part, gradient in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.grad = gradient.view_as(part).clone()
            optimizer.step()
    except ConfigError:
        raise
    except Exception as error:  # whatever the class raises
        raise ConfigError(f"optim.of={of} with optim.args={args} cannot take a step: {first_line(error)}") from error
    after = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    others = [
        key for state in optimizer.state.values() for key, value in state.items() if not isinstance(value, Tensor)
    ]
    if after != before or others:
        raise ConfigError(f"optim.of={of} keeps state that is no tensor of a parameter, which no checkpoint would hold")
    return parts, optimizer


def like(p: Tensor, part: Tensor) -> Tensor:
    """A tensor that is sharded like a parameter, from this process's part."""
    if isinstance(p, FlatShard):
        return p.with_part(part)
    if isinstance(p, DTensor):
        return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    return part


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
