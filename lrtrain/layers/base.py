"""What every factorized linear layer offers to the rest of lrtrain.

A layer stands for a map of x (..., in) to (..., out). Where the map is linear it represents one matrix
W (out, in), read with `dense_weight()`. Layers know nothing of engines, optimizers or configs: they are built
on the meta device, get their values from `init_parameters` and `init_buffers`, and are then trained like any
other module.
"""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Role = Literal["factor_left", "factor_right", "sparse_values", "singular_values", "bias"]
M = TypeVar("M", bound=nn.Module)


class FactorizedLinear(nn.Module, ABC):
    """A linear layer of shape (out, in) that is stored as factors of rank `rank`."""

    execution: str | None = None
    """How `forward` computes the map, where there are several ways; see `settle`."""

    roles: ClassVar[dict[str, Role]]
    """What each parameter (by its name in this module) is: optimizers and weight decay read it."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""

    @abstractmethod
    def init_parameters(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Initial values of all parameters by name: whole float32 CPU tensors, a function of the generator only."""

    def init_buffers(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Values of the buffers that a seed gives back (sparse supports): whole CPU tensors, never checkpointed."""
        return {}

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The matrix W (out, in) that this layer stands for, without the bias.

        Raises:
            NotImplementedError: where the map is not linear, saying why.
        """

    @abstractmethod
    def singular_values(self) -> Tensor:
        """Singular values of W, descending, float64. Needs whole parameters: see `gathered`."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating-point operations (a multiply-add is two) of one forward pass over `tokens` tokens.

        A training step costs three times that. Work that an execution repeats or adds (rebuilding W) is not counted.
        """

    def settle(self, tokens: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Choose the execution by measurement and return its name; None where there is nothing to choose."""
        return None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor (a collective if it is sharded), detached."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gathered(module: M) -> M:
    """A twin of the module whose parameters are whole plain tensors on every process.

    A collective: all processes of the mesh must call it. Buffers are shared with the original, nothing is trained.
    """
    twin = copy.copy(module)
    twin._parameters = {
        name: p if p is None else nn.Parameter(whole(p), requires_grad=False) for name, p in module._parameters.items()
    }
    twin._modules = {name: child and gathered(child) for name, child in module._modules.items()}
    return twin
