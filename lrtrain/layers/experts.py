"""Factorized experts: a batch of layers of one class and shape, each applied to the tokens routed to it.

Each expert runs the forward pass of its layer class; a class supports this by setting `batchable = True`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lrtrain.core.seeds import generator_for
from lrtrain.layers.base import FactorizedLinear
from lrtrain.linalg.nearest import Fit


class FactorizedExperts(FactorizedLinear):
    """A batch of layers of one class and shape, with parameters (experts, …) under the names of a single layer.

    Args:
        one: a layer on meta, the template of all experts; it also holds their execution.
        experts: number of experts.
        per_token: number of experts that process a token.
        transposed: whether the dense weight is stored as (experts, in, out).
    """

    def __init__(self, one: FactorizedLinear, experts: int, per_token: int, transposed: bool):
        super().__init__(one.in_features, one.out_features, one.rank)
        self.one = (one,)  # in a tuple, so that its parameters are not registered
        self.batch = experts
        self.per_token = per_token
        self.transposed = transposed
        self.roles = one.roles  # pyright: ignore  (those of its class)
        for key, p in one.named_parameters():
            holder, name = self._holder(key)
            holder.register_parameter(name, nn.Parameter(_stack_of(p, experts), p.requires_grad))
        for key, buffer in one.named_buffers():
            persistent = key not in one._non_persistent_buffers_set
            self.register_buffer(key, _stack_of(buffer, experts), persistent=persistent)

    def _holder(self, key: str) -> tuple[nn.Module, str]:
        """The child module that holds the parameter of this qualified name (created if missing), and its name there."""
        *path, name = key.split(".")
        holder: nn.Module = self
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        return holder, name

    @property
    def execution(self) -> str | None:  # pyright: ignore
        return self.one[0].execution

    @execution.setter
    def execution(self, value: str | None) -> None:  # pyright: ignore
        self.one[0].execution = value

    def each(self) -> list[FactorizedLinear]:
        """One layer per expert, whose parameters are views of this module's, so that gradients flow into them."""
        tensors = (*self.named_parameters(), *self.named_buffers())
        of_each = zip(*(tensor.unbind(0) for _, tensor in tensors), strict=True)
        return [_with(self.one[0], dict(zip((key for key, _ in tensors), own, strict=True))) for own in of_each]

    @torch.compiler.disable
    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (tokens, in), sorted by expert → (tokens, out).

        Args:
            sizes: number of tokens of each expert (experts,), int64.
        """
        lengths = even_split(len(x), self.batch) if sizes.is_meta else sizes.tolist()
        parts = zip(self.each(), x.split(lengths), strict=True)
        return torch.cat([layer(part) for layer, part in parts if len(part)])

    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        return _stacked([self.one[0].init_parameters(own) for own in self._generators(generator)])

    def init_buffers(self, generator: torch.Generator) -> dict[str, Tensor]:
        return _stacked([self.one[0].init_buffers(own) for own in self._generators(generator)])

    def _generators(self, generator: torch.Generator) -> list[torch.Generator]:
        """One generator per expert, a function of (seed, name, expert)."""
        seed = int(torch.randint(2**62, (), generator=generator))
        return [generator_for(seed, f"expert {i}") for i in range(self.batch)]

    def check_start(self) -> None:
        self.one[0].check_start()

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        """weight (experts, out, in)."""
        given = zip(self.each(), weight, self._generators(generator), strict=True)
        return _stacked([layer.start_from(own, fit, dice) for layer, own, dice in given])

    def dense_weight(self) -> Tensor:
        """(experts, out, in)."""
        return torch.stack([layer.dense_weight() for layer in self.each()])

    def singular_values(self) -> Tensor:
        """Singular values (experts, …), descending for each expert."""
        return torch.stack([layer.singular_values() for layer in self.each()])

    @property
    def spectrum_size(self) -> int:
        return self.one[0].spectrum_size

    def flops(self, tokens: int) -> int:
        return self.one[0].flops(self.per_token * tokens)

    def dense_flops(self, tokens: int) -> int:
        return super().dense_flops(self.per_token * tokens)

    def training_flops(self, tokens: int) -> int:
        return self.one[0].training_flops(self.per_token * tokens)

    def autotune(self, tokens: int, dtype: torch.dtype, device: torch.device) -> str | None:
        return self.one[0].autotune(max(1, tokens * self.per_token // self.batch), dtype, device)

    def factor_pair(self) -> tuple[str, str] | None:
        return self.one[0].factor_pair()

    def revision_due(self, step: int) -> bool:
        return self.one[0].revision_due(step)

    def revise(self, step: int, generator: torch.Generator) -> None:
        for layer, own in zip(self.each(), self._generators(generator), strict=True):
            layer.revise(step, own)

    def resets(self, step: int) -> Any:
        return self.one[0].resets(step)

    def extra_repr(self) -> str:
        return f"{self.batch} × {self.one[0]!r}"


def even_split(tokens: int, experts: int) -> list[int]:
    """Nearly equal numbers of tokens per expert that sum to `tokens`, for planning without routed tokens."""
    return [tokens // experts + (i < tokens % experts) for i in range(experts)]


def _stack_of(tensor: Tensor, experts: int) -> Tensor:
    return torch.empty(experts, *tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _stacked(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}


def _with(module: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """The module with its parameters and buffers replaced by these tensors, by qualified name."""
    made = object.__new__(type(module))
    made.__dict__ = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = getattr(module, kind)
        made.__dict__[kind] = {key: None if value is None else tensors[prefix + key] for key, value in own.items()}
    made.__dict__["_modules"] = {
        key: child and _with(child, tensors, f"{prefix}{key}.") for key, child in module._modules.items()
    }
    return made
