"""The interface of engines, and what all engines share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import PreTrainedModel

from lrtrain.config.schema import Config
from lrtrain.distributed.sharding import local
from lrtrain.distributed.world import World
from lrtrain.engine.blocks import prepare_blocks
from lrtrain.engine.in_backward import InBackward, clip_one
from lrtrain.engine.resize import carry_over
from lrtrain.engine.revision import revise_layers
from lrtrain.errors import ConfigError
from lrtrain.model.loss import TokenLoss
from lrtrain.model.structure import factorized_layers
from lrtrain.optim.base import ShardedOptimizer

MakeOptimizer = Callable[[PreTrainedModel], ShardedOptimizer]


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step."""

    grad_norm: float
    """Global L2 norm over all trainable parameters before clipping."""
    skipped: bool
    """True if loss or gradient was not finite: parameters and optimizer state are then unchanged. With updates in the
    backward pass and a finite loss, only the parameters with a non-finite gradient are unchanged."""
    sums: list[float]
    """The shares given to `clip_and_step`, summed over all processes."""


@dataclass(frozen=True)
class Spread:
    """The number of processes that each kind of tensor is sharded over."""

    parameters: int
    gradients: int
    states: int
    masters: bool = False
    """Whether float32 master parameters are kept besides those used in forward, sharded like the optimizer state."""


class Engine(ABC):
    """Shards a model over the processes and runs its steps. All methods are collectives.

    An engine defines how a model gets its storage (`_distribute`) and how gradients are computed (`forward_backward`);
    the rest is the same for all engines.

    Args:
        dtype: of activations and of the parameters used in forward; the optimizer's parameters keep their own dtype.
        compile: compile each block.
        recompute_every, recompute_keep: what the backward pass recomputes; see `prepare_blocks`.
    """

    model: PreTrainedModel
    """Computes."""
    loss: TokenLoss
    """The module to call in every forward pass, since engines put hooks on it."""
    shards: PreTrainedModel
    """The same model, or a twin of it, whose parameters are the shards that the optimizer steps. Parameters are read
    and written here (`local`, `whole`, `gathered`, `keep_shard`); call `_publish` after writing."""
    optimizer: ShardedOptimizer
    document_end: int | None = None
    """The token that ends a document, if documents do not see each other; set before `prepare`. See `TokenLoss`."""

    def __init__(self, world: World, dtype: torch.dtype, compile: bool, recompute_every: int, recompute_keep: str):
        self.world = world
        self.dtype = dtype
        self.compile = compile
        self.recompute_every = recompute_every
        self.recompute_keep = recompute_keep

    @classmethod
    @abstractmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Check that this engine supports the configuration, before anything is built.

        Raises:
            ConfigError: if it does not, naming the keys and what would be right.
        """

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        """Check that this engine can train a model (on meta).

        Raises:
            ConfigError: if it cannot, naming the layer or parameter and what would be right.
        """
        penalized = [name for name, layer in factorized_layers(model).items() if layer.penalized]
        if penalized and config.optim["in_backward"]:
            raise ConfigError(
                f"{penalized[0]} (param={config.param['name']}) has a penalty, which adds to the gradients after the "
                f"backward pass, when optim.in_backward=true has used them; set optim.in_backward=false"
            )

    @classmethod
    @abstractmethod
    def spread(cls, config: Config, world_size: int) -> Spread:
        """How this engine would shard tensors over `world_size` processes."""

    @abstractmethod
    def _distribute(self, model: PreTrainedModel, seed: int, fresh: bool) -> PreTrainedModel:
        """Shard a model on meta over the processes, with its initial values; returns the `shards`."""

    def prepare(self, model: PreTrainedModel, seed: int, make_optimizer: MakeOptimizer, fresh: bool = True) -> None:
        """Shard a model on meta, give it storage and initial values, and create its optimizer.

        Without `fresh` its state is going to be loaded, and costly initial values are skipped.
        """
        self.seed = seed
        prepare_blocks(model, self.recompute_every, self.recompute_keep, self.compile)
        self.model = model.train()
        self.loss = TokenLoss(model, self.document_end)
        self.shards = self._distribute(model, seed, fresh)
        self.layers = [*factorized_layers(self.shards).values()]
        self.optimizer = make_optimizer(self.shards)
        self.in_backward = InBackward(self.optimizer, self._clip_of_one) if self.optimizer.in_backward else None

    def _publish(self) -> None:  # noqa: B027
        """Make the forward pass use the values written into `shards`."""

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, lr: float, clip: float | None, clip_by: str) -> None:
        """Set learning rate and clipping before the first micro-batch of a step.

        Args:
            step: number of completed steps, for layers with an `lr_factor`.
            clip: the largest gradient norm, or None.
            clip_by: `global`, or `parameter`: each of n parameters is clipped to clip/√n.
        """
        self.clip, self.clip_by = clip, clip_by
        pace = next((layer.lr_factor(step) for layer in self.layers if layer.paced), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"] * (pace if group["paced"] else 1.0)
        if self.in_backward is not None:
            self.in_backward.begin()

    @abstractmethod
    def forward_backward(self, rows: Tensor, tokens: int, last: bool = True) -> Tensor:
        """Accumulate the gradient of `TokenLoss` of this micro-batch ÷ tokens.

        Args:
            rows: this process's token ids (sequences, seq_len + 1).
            tokens: target tokens of the whole step over all processes and micro-batches.
            last: whether this is the step's last micro-batch, after which the gradients of `shards` are fully reduced.

        Returns:
            `TokenLoss` of this process's rows, detached, on the device.
        """

    def clip_and_step(self, shares: Tensor | float) -> StepResult:
        """Clip, take one optimizer step, and clear the gradients.

        The step is skipped if the loss or the gradient norm is not finite.

        Args:
            shares: what is summed over the processes together with the norm, on the device; first this process's share
                of the step's loss.
        """
        if self.in_backward is None:
            self._add_penalties()
        sums = self._sum(torch.as_tensor(shares, dtype=torch.float64, device=self.world.device).reshape(-1))
        *told, norm = sums.cpu().tolist()  # waits for the device, so all is read at once
        finite = math.isfinite(norm) and math.isfinite(told[0])
        if self.in_backward is None:
            if finite:
                self._clip(sums[-1].float(), norm)
            self._update(finite)
        elif not finite:
            self.in_backward.take_back_counts()
        if self.in_backward is not None or finite:
            self._after_step()
        self.optimizer.zero_grad()
        return StepResult(norm, not finite, told)

    @torch.no_grad()
    def _sum(self, shares: Tensor) -> Tensor:
        """`shares` summed over all processes, then the norm of the gradient, in float64 by one collective."""
        sums = torch.cat([shares, self._squares().reshape(1)])
        if self.world.size > 1:
            dist.all_reduce(sums)
        sums[-1].sqrt_()
        return sums

    def _squares(self) -> Tensor:
        """This process's share of the squared norm of the gradient."""
        if self.in_backward is not None:
            return self.in_backward.squares() / self.world.size  # which all processes have
        squares = torch.stack(torch._foreach_norm(self._gradients(), dtype=torch.float32)).square().sum()
        rows = next(iter(self.optimizer.rows.values()))  # all parameters are spread over as many processes
        return squares.double() * (rows.holders / self.world.size)  # each replica has the whole gradient

    def _add_penalties(self) -> None:
        for layer in self.layers:
            if layer.penalized:
                layer.add_penalty()

    @torch.no_grad()
    def _after_step(self) -> None:
        for layer in self.layers:
            if layer.constrained:
                layer.after_step()

    def _update(self, finite: bool) -> None:
        """Take the optimizer's step if the gradients are finite."""
        if finite:
            self.optimizer.step()

    def _gradients(self) -> list[Tensor]:
        """This process's part of each gradient."""
        return [local(p.grad) for p in self.optimizer.parameters if p.grad is not None]

    @torch.no_grad()
    def _clip(self, norm: Tensor, told: float) -> None:
        """Clip the gradients, whose norm is `norm` on the device and `told` here."""
        if self.clip is None:
            return
        if self.clip_by == "global":
            if told > 0.999 * self.clip:  # avoids reading and writing all gradients; the device decides what is near
                torch._foreach_mul_(self._gradients(), (self.clip / (norm + 1e-6)).clamp(max=1))
            return
        for p in self.optimizer.parameters:
            if p.grad is not None:
                clip_one(p, self.optimizer.rows[p], self._clip_of_one())

    def _clip_of_one(self) -> float | None:
        """The largest norm of one parameter's gradient, such that the norm of all is at most `clip`."""
        return None if self.clip is None else self.clip / math.sqrt(len(self.optimizer.parameters))

    # --- between steps -----------------------------------------------------------------------------------------------

    def revise(self, step: int) -> None:
        """Revise the layers that are due after `step` steps, with resets of their optimizer state."""
        if revise_layers(self.shards, self.optimizer, step, self.seed):
            self._publish()

    def resize(self, model: PreTrainedModel, make_optimizer: MakeOptimizer) -> None:
        """Continue with a model on meta that has smaller ranks; it gets the leading part of each parameter and
        optimizer state."""
        old, old_optimizer = self.shards, self.optimizer
        if self.compile:
            torch.compiler.reset()  # graphs of the old shapes would count towards the recompilation limit
        self.prepare(model, self.seed, make_optimizer, fresh=False)
        carry_over(old, old_optimizer, self.shards, self.optimizer)
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """State of model and optimizer, keyed by qualified parameter names, with unsharded shapes. The tensors are not
        copies, so a checkpoint can be loaded into them."""
        return {"model": get_model_state_dict(self.shards), "optimizer": self.optimizer.named_state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from `state_dict`, filled in place or with other tensors of the same shards."""
        for part, own in self.state_dict().items():
            for name, value in own.items():
                local(value).copy_(local(state[part][name]))
        self._publish()
