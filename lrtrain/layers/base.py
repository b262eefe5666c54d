"""What every factorized linear layer offers to the rest of lrtrain.

A layer stands for a map of x (..., in) to (..., out). Where the map is linear it represents one matrix
W (out, in), read with `dense_weight()`. Layers know nothing of engines, optimizers or configs: they are built
on the meta device, get their values from `init_parameters` and `init_buffers`, and are then trained like any
other module. A method with a schedule of its own also says what happens between steps, in hooks that do nothing by
default: `draw`, `add_penalty`, `after_step`, `revise` (with `revision_due` and `resets`), `lr_factor`, `wanted_rank`
(with `resize_due`)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lrtrain.linalg.nearest import Fit

Role = Literal["factor_left", "factor_right", "sparse_values", "singular_values", "frozen", "bias"]


@dataclass(frozen=True)
class Reset:
    """What becomes of a parameter's optimizer state when its layer was revised."""

    pruned: float = 1.0
    """Share of the entries that is set to zero, the same ones in all moments."""
    by: Literal["magnitude", "random"] = "magnitude"
    """Which entries these are: those of the smallest first moment, or random ones."""
    restart: bool = True
    """Whether the optimizer's step counter for this parameter goes back to zero (its bias correction begins anew)."""


class FactorizedLinear(nn.Module, ABC):
    """A linear layer of shape (out, in) that is stored as factors of rank `rank`."""

    execution: str | None = None
    """How `forward` computes the map, where there are several ways; see `settle`."""

    roles: ClassVar[dict[str, Role]]
    """What each parameter (by its name in this module) is: optimizers and weight decay read it."""

    paced: ClassVar[frozenset[str]] = frozenset()
    """The parameters whose learning rate is multiplied by `lr_factor`."""

    init_version: ClassVar[int | None] = None
    """Where `init_parameters` takes so long (an SVD) that its results are kept on disk: a number to raise whenever it
    gives other values. None: they are not kept."""

    penalized: bool = False
    """Whether `add_penalty` does something."""

    constrained: bool = False
    """Whether `after_step` does something."""

    batchable: ClassVar[bool] = False
    """Whether a batch of such layers can stand for a layer's experts; see `FactorizedExperts`."""

    transposed: bool = False
    """Whether the dense layer in whose place it is keeps its weight as (in, out)."""

    batch: int = 1
    """How many such layers this one holds: with more than one W is (batch, out, in)."""

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
        """Initial values of all parameters and persistent buffers by name: whole CPU tensors (parameters in float32),
        a function of the generator only, whatever the number of threads."""

    def init_buffers(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Values of the buffers that a seed gives back (sparse supports): whole CPU tensors, never checkpointed."""
        return {}

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        """Values of all parameters but the bias, and of persistent buffers, by name, with which the layer is as near to
        weight (out, in), float64, as `fit` means it. Whole tensors; the layer gives shapes, settings and its other
        buffers. Only where `check_start` has nothing to say.
        """
        raise NotImplementedError(f"{type(self).__name__} has no start from a weight")

    def check_start(self) -> None:
        """Whether `start_from` has something to start; the layer may be on meta.

        Raises:
            NotImplementedError: where it has not, saying why.
        """
        self.dense_weight()

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The matrix W (out, in) that this layer stands for, without the bias.

        Raises:
            NotImplementedError: where the map is not linear, saying why.
        """

    @abstractmethod
    def singular_values(self) -> Tensor:
        """Singular values of W, descending, float64. Needs whole parameters: see `gathered`.

        Of a nonlinear layer: those of the map with its activation taken as the identity."""

    @property
    def spectrum_size(self) -> int:
        """The size of the eigenproblem that `singular_values` solves."""
        return min(self.in_features, self.out_features)

    def left_factor(self) -> Tensor | None:
        """C (out, k) where W = C·R with R = `right_factor()`; None where W is no such product, or
        a row of C needs more than the same row of the layer's parameters. So of row shards it is a row shard of C."""
        return None

    def right_factor(self) -> Tensor:
        """R (k, in), from the parameters of the role `factor_right` alone; see `left_factor`."""
        raise NotImplementedError(f"{type(self).__name__} is not a product of two factors")

    def parts(self) -> tuple[Tensor, Tensor] | None:
        """L (out, in) of rank `rank` at the most and S (out, in) with W = L + S; None where W is not such a sum. Needs
        whole parameters: see `gathered`. Of a nonlinear layer: with its activation taken as the identity."""
        return None

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating-point operations (a multiply-add is two) of one forward pass over `tokens` tokens.

        Work that an execution repeats or adds (rebuilding W) is not counted.
        """

    def dense_flops(self, tokens: int) -> int:
        """The same of the dense layer in whose place it is."""
        return 2 * tokens * self.in_features * self.out_features

    def training_flops(self, tokens: int) -> int:
        """The same of forward and backward pass: three times as many where all parameters are trained."""
        return 3 * self.flops(tokens)

    def settle(self, tokens: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Choose the execution by measurement and return its name; None where there is nothing to choose."""
        return None

    def factor_pair(self) -> tuple[str, str] | None:
        """Names of the parameters B (out, r) and A (r, in) of which W, or W but for a sum, is c·B A with a constant c.

        None where there are none, or where more than that lies between them (an activation, a residual, a rank that
        changes from step to step). Then the gradients are c·G Aᵀ and c·BᵀG with the G = ∂L/∂W that both share, which
        is what optimizers for pairs rely on."""
        return None

    # --- what happens between steps --------------------------------------------------------------------------------

    def draw(self, generator: torch.Generator) -> None:
        """Before each step: make the random choices of its forward passes in training mode. `generator` is a function
        of (seed, step) alone, so all layers and processes draw the same."""

    def add_penalty(self) -> None:
        """After the backward passes of a step, if `penalized`: add the gradients of the layer's own penalty to `.grad`.

        Parameters and gradients may be shards (DTensors)."""

    def after_step(self) -> None:
        """After each optimizer step, if `constrained`, without gradients: restore what the parameters must satisfy
        (unit norms, signs).

        Parameters may be shards (DTensors)."""

    def revision_due(self, step: int) -> bool:
        """Whether `revise` has something to do when `step` optimizer steps are done."""
        return False

    def revise(self, step: int, generator: torch.Generator) -> None:
        """When `step` optimizer steps are done, without gradients: change parameters and persistent buffers in place.

        One process does it for all, on whole plain tensors (see `gathered`); the others take over its values.
        `generator` is a function of (seed, layer name, step) alone.
        """

    def resets(self, step: int) -> Mapping[str, Reset]:
        """What becomes of the optimizer state of which parameters (by name) in the revision at `step`."""
        return {}

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate of the `paced` parameters for the update after `step` done steps."""
        return 1.0

    # --- smaller ranks ---------------------------------------------------------------------------------------------

    def resize_due(self, step: int) -> bool:
        """Whether the layer may want a smaller rank when `step` optimizer steps are done."""
        return False

    def wanted_rank(self) -> int:
        """The rank ≥ 1 to go on with: the layer is built anew with it and keeps the leading rows and columns of its
        parameters. Needs whole parameters: see `gathered`."""
        return self.rank

    def ranks_to_evaluate(self) -> dict[float, int]:
        """Share of the rank → rank, for those at which the layer is a useful map too: evaluated at a run's end."""
        return {}

    def truncate(self, rank: int) -> None:
        """From now on be the layer of this rank ≤ `self.rank` in eval mode; nothing is lost, and training goes on with
        the whole."""
        raise NotImplementedError(f"{type(self).__name__} has no smaller ranks in it")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
