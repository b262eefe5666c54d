"""What the training loop needs of an engine."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lrtrain.distributed import World
from lrtrain.optim.base import ShardedOptimizer


@dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step."""

    grad_norm: float
    """Global L2 norm over all trainable parameters before clipping."""
    skipped: bool
    """True if loss or gradient was not finite: then neither parameters nor optimizer state were touched. With updates
    in the backward pass that holds for the parameters whose gradient was not finite."""


class Engine(ABC):
    """Shards a model over the processes and runs its steps. All methods are collectives."""

    world: World
    model: PreTrainedModel
    optimizer: ShardedOptimizer

    @abstractmethod
    def prepare(
        self,
        model: PreTrainedModel,
        seed: int,
        make_optimizer: Callable[[PreTrainedModel], ShardedOptimizer],
        fresh: bool = True,
    ) -> None:
        """Take a model on meta: shard it, give it storage and initial values, and make its optimizer.

        Without `fresh` its state is about to be loaded, and values that are costly to draw are not.
        """

    @abstractmethod
    def begin_step(self, step: int, lr: float, clip: float | None, clip_by: str) -> None:
        """Before the first micro-batch of a step: its learning rate and clipping.

        Args:
            step: the steps done before; layers with a pace of their own follow it.
            clip: the largest norm of the gradient, or None.
            clip_by: `global`, or `parameter`: each of n parameters is clipped to clip/√n.
        """

    @abstractmethod
    def forward_backward(self, rows: Tensor, tokens: int) -> Tensor:
        """Add the gradient of (sum of this micro-batch's token losses) / tokens to the gradients.

        Args:
            rows: this process's token ids (sequences, seq_len + 1).
            tokens: target tokens of the whole step over all processes and micro-batches.

        Returns:
            The sum of the token losses of this process's rows, a detached scalar on the device.
        """

    @abstractmethod
    def clip_and_step(self, loss: float) -> StepResult:
        """Clip, take one optimizer step, and clear the gradients.

        If the gradient norm or `loss` (the step's, over all processes) is not finite the step is skipped.
        """

    @abstractmethod
    def revise(self, step: int) -> None:
        """Let the layers that have something to do when `step` steps are done do it, optimizer states included."""

    @abstractmethod
    def resize(self, model: PreTrainedModel, make_optimizer: Callable[[PreTrainedModel], ShardedOptimizer]) -> None:
        """Go on with a model on meta that differs from the present one by smaller ranks: it takes over the leading
        part of each parameter and optimizer state."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer in the canonical form: keyed by qualified parameter names, unsharded shapes."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, at any world size."""
