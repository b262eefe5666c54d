"""The interface of factorized linear layers.

A layer maps x (..., in) to (..., out). A linear layer represents one matrix W (out, in), returned by `dense_weight()`.
Layers know nothing about engines, optimizers or configs: they are built on the meta device, get their values from
`init_parameters` and `init_buffers`, and are then trained like any other module. Hooks that run between steps do
nothing by default: `draw`, `add_penalty`, `after_step`, `revise` (with `revision_due` and `resets`), `lr_factor`,
`wanted_rank` (with `resize_due`)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lrtrain.linalg.nearest import Fit

Role = Literal["matrix", "factor_left", "factor_right", "sparse_values", "singular_values", "frozen", "bias"]


@dataclass(frozen=True)
class Reset:
    """How a parameter's optimizer state is reset after its layer was revised."""

    pruned: float = 1.0
    """Share of the entries that is set to zero, at the same positions in all moments."""
    by: Literal["magnitude", "random"] = "magnitude"
    """Entries to set to zero: those with the smallest first moment, or random ones."""
    restart: bool = True
    """Whether the parameter's step counter is reset to zero, which restarts Adam's bias correction."""


class FactorizedLinear(nn.Module, ABC):
    """A linear layer of shape (out, in), stored as factors of rank `rank`."""

    execution: str | None = None
    """The implementation that `forward` uses, if there are several; see `autotune`."""

    roles: ClassVar[dict[str, Role]]
    """The role of each parameter by its name in this module: optimizers and weight decay depend on it. A `matrix`,
    `factor_left` or `factor_right` has two dimensions, or three if it is a batch of matrices."""

    paced: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters whose learning rate is multiplied by `lr_factor`."""

    init_version: ClassVar[int | None] = None
    """The version of `init_parameters` if its results are cached on disk because they are slow to compute (an SVD):
    increase it when the values change. None: not cached."""

    penalized: bool = False
    """Whether the layer implements `add_penalty`."""

    constrained: bool = False
    """Whether the layer implements `after_step`."""

    batchable: ClassVar[bool] = False
    """Whether a batch of these layers can replace a layer's experts; see `FactorizedExperts`."""

    splittable: ClassVar[bool] = False
    """Whether the layer can be split between processes: forward(x) = expand(latents(x)), see these two. A subclass with
    a `forward` of its own has to say so again."""

    transposed: bool = False
    """Whether the dense layer that this one replaces stores its weight as (in, out)."""

    batch: int = 1
    """Number of layers in a batch; with more than one, W is (batch, out, in)."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and "splittable" not in vars(cls):
            cls.splittable = False

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
        """Initial values of all parameters and persistent buffers by name: unsharded CPU tensors (parameters in
        float32) that depend on the generator only, not on the number of threads."""

    def init_buffers(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Values of the buffers that are regenerated from the seed (sparse supports): unsharded CPU tensors, never
        checkpointed."""
        return {}

    def start_from(self, weight: Tensor, fit: Fit, generator: torch.Generator) -> dict[str, Tensor]:
        """Unsharded values, by name, of all parameters except the bias and of persistent buffers that bring the layer
        nearest to weight (out, in), float64, in the sense of `fit`. Shapes, settings and other buffers are the layer's.
        Call `check_start` first.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot start from a weight")

    def check_start(self) -> None:
        """Check that `start_from` works for this layer, which may be on meta.

        Raises:
            NotImplementedError: if it does not, with the reason.
        """
        self.dense_weight()

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The matrix W (out, in) of this layer, without the bias.

        Raises:
            NotImplementedError: if the layer is not linear, with the reason.
        """

    @abstractmethod
    def singular_values(self) -> Tensor:
        """Singular values of W, descending, float64. Needs unsharded parameters (see `gathered`).

        A nonlinear layer returns those with the identity as its activation."""

    @property
    def spectrum_size(self) -> int:
        """The size of the eigenproblem that `singular_values` solves."""
        return min(self.in_features, self.out_features)

    def left_factor(self) -> Tensor | None:
        """C (out, k) with W = C·R and R = `right_factor()`, such that row i of C depends on row i of the parameters
        only (so row shards of the parameters give a row shard of C). None if there is no such product."""
        return None

    def right_factor(self) -> Tensor:
        """R (k, in), computed from the parameters with role `factor_right` only; see `left_factor`."""
        raise NotImplementedError(f"{type(self).__name__} is not a product of two factors")

    def parts(self) -> tuple[Tensor, Tensor] | None:
        """L (out, in) of rank ≤ `rank` and sparse S (out, in) with W = L + S; None if W is not such a sum. Needs
        unsharded parameters (see `gathered`). A nonlinear layer takes its activation as the identity."""
        return None

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating-point operations (a multiply-add is two) of one forward pass over `tokens` tokens.

        Extra work of an execution (forming W) is not counted.
        """

    def dense_flops(self, tokens: int) -> int:
        """`flops` of the dense layer that this one replaces."""
        return 2 * tokens * self.in_features * self.out_features

    def training_flops(self, tokens: int) -> int:
        """Floating-point operations of forward and backward pass: 3 × `flops` if all parameters are trained."""
        return 3 * self.flops(tokens)

    def autotune(self, tokens: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Choose the fastest execution and return its name; None if there is only one."""
        return None

    def factor_pair(self) -> tuple[str, str] | None:
        """Names of the parameters B (out, r) and A (r, in) with W = c·B A, or W = c·B A + another term, c constant.

        None if there are none, or if W is not linear in B A (an activation, a residual, a rank that changes from step
        to step). Optimizers for pairs rely on the gradients c·G Aᵀ and c·BᵀG with the same G = ∂L/∂W."""
        return None

    # --- split between processes -----------------------------------------------------------------------------------

    def latents(self, x: Tensor, first: int = 0) -> Tensor:
        """x (..., n) with the input features first … first + n − 1 → their part of the latents (..., k).

        Linear in x: the parts add up to the latents of all features. Parameters with role `factor_right` have only
        these n columns; those with other roles are not used. Only of a `splittable` layer.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be split between processes")

    def expand(self, z: Tensor, first: int = 0) -> Tensor:
        """Latents (..., k) of all features → m output features (..., m) from `first` on.

        Parameters have only these m rows, except those with role `factor_right`, which are not used. Only of a
        `splittable` layer.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be split between processes")

    # --- what happens between steps --------------------------------------------------------------------------------

    def draw(self, generator: torch.Generator) -> None:
        """Before each step: draw the random choices for its forward passes in training mode. `generator` depends on
        (seed, step) only, so all layers and processes draw the same."""

    def add_penalty(self) -> None:
        """After the backward passes of a step, if `penalized`: add the gradients of the layer's penalty to `.grad`.

        Parameters and gradients may be shards (DTensors)."""

    def after_step(self) -> None:
        """After each optimizer step, if `constrained`, under no_grad: project the parameters onto their constraints
        (unit norms, signs).

        Parameters may be shards (DTensors)."""

    def revision_due(self, step: int) -> bool:
        """Whether `revise` is to be called after `step` optimizer steps."""
        return False

    def revise(self, step: int, generator: torch.Generator) -> None:
        """After `step` optimizer steps, under no_grad: change parameters and persistent buffers in place.

        One process calls it, on unsharded plain tensors (see `gathered`), and broadcasts the new values.
        `generator` depends on (seed, layer name, step) only.
        """

    def resets(self, step: int) -> Mapping[str, Reset]:
        """The reset of the optimizer state of each affected parameter, by name, in the revision at `step`."""
        return {}

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate of the `paced` parameters for the update after `step` completed steps."""
        return 1.0

    # --- smaller ranks ---------------------------------------------------------------------------------------------

    def resize_due(self, step: int) -> bool:
        """Whether `wanted_rank` is to be called after `step` optimizer steps."""
        return False

    def wanted_rank(self) -> int:
        """The rank ≥ 1 to continue with: the layer is rebuilt with this rank and keeps the leading rows and columns of
        its parameters. Needs unsharded parameters (see `gathered`)."""
        return self.rank

    def ranks_to_evaluate(self) -> dict[float, int]:
        """Share of the rank → rank, for the smaller ranks that are evaluated at the end of a run."""
        return {}

    def truncate(self, rank: int) -> None:
        """Use only this rank ≤ `self.rank` in eval mode from now on; parameters and training are unchanged."""
        raise NotImplementedError(f"{type(self).__name__} cannot be truncated to a smaller rank")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
