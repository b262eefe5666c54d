"""What the training loop needs of an engine, and what all engines do alike."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
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
    """What became of one optimizer step."""

    grad_norm: float
    """Global L2 norm over all trainable parameters before clipping."""
    skipped: bool
    """True if loss or gradient was not finite: then neither parameters nor optimizer state were touched. With updates
    in the backward pass that holds for the parameters whose gradient was not finite."""


@dataclass(frozen=True)
class Spread:
    """Over how many processes each kind of tensor is spread."""

    parameters: int
    gradients: int
    states: int
    masters: bool = False
    """Whether float32 parameters are kept besides those that compute, spread as the states are."""


class Engine(ABC):
    """Shards a model over the processes and runs its steps. All methods are collectives.

    An engine says how a model gets its storage (`_distribute`) and how gradients come about (`forward_backward`); what
    is done with them is the same for all.

    Args:
        dtype: of activations and of the parameters in use; what the optimizer steps keeps its own.
        compile: compile each block.
        recompute_every, recompute_keep: what the backward pass recomputes; see `prepare_blocks`.
    """

    model: PreTrainedModel
    """Computes."""
    loss: TokenLoss
    """What is run: engines hook on it, so no forward pass goes past it."""
    shards: PreTrainedModel
    """The same model, or a twin of it, whose parameters are the shards that the optimizer steps: what reads or writes
    parameters does it there (`local`, `whole`, `gathered`, `keep_shard`), and then calls for `_publish`."""
    optimizer: ShardedOptimizer

    def __init__(self, world: World, dtype: torch.dtype, compile: bool, recompute_every: int, recompute_keep: str):
        self.world = world
        self.dtype = dtype
        self.compile = compile
        self.recompute_every = recompute_every
        self.recompute_keep = recompute_keep

    @classmethod
    @abstractmethod
    def check(cls, config: Config, world_size: int) -> None:
        """Refuse what this engine cannot do, before anything is built.

        Raises:
            ConfigError: naming the keys and what would be right.
        """

    @classmethod
    def check_model(cls, config: Config, model: nn.Module) -> None:
        """Refuse a model on meta that this engine cannot train.

        Raises:
            ConfigError: naming the layer or parameter and what would be right.
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
        """What a process of so many would hold."""

    @abstractmethod
    def _distribute(self, model: PreTrainedModel, seed: int, fresh: bool) -> PreTrainedModel:
        """Spread a model on meta over the processes, with its initial values; returns what becomes `shards`."""

    def prepare(self, model: PreTrainedModel, seed: int, make_optimizer: MakeOptimizer, fresh: bool = True) -> None:
        """Take a model on meta: shard it, give it storage and initial values, and make its optimizer.

        Without `fresh` its state is about to be loaded, and values that are costly to draw are not.
        """
        self.seed = seed
        prepare_blocks(model, self.recompute_every, self.recompute_keep, self.compile)
        self.model = model.train()
        self.loss = TokenLoss(model)
        self.shards = self._distribute(model, seed, fresh)
        self.layers = [*factorized_layers(self.shards).values()]
        self.optimizer = make_optimizer(self.shards)
        self.in_backward = InBackward(self.optimizer, self._clip_of_one) if self.optimizer.in_backward else None

    def _publish(self) -> None:  # noqa: B027
        """Let the model compute with what was written into `shards`."""

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, lr: float, clip: float | None, clip_by: str) -> None:
        """Before the first micro-batch of a step: its learning rate and clipping.

        Args:
            step: the steps done before; layers with a pace of their own follow it.
            clip: the largest norm of the gradient, or None.
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
        """Add the gradient of (what `TokenLoss` gives for this micro-batch) / tokens to the gradients.

        Args:
            rows: this process's token ids (sequences, seq_len + 1).
            tokens: target tokens of the whole step over all processes and micro-batches.
            last: whether this is the step's last micro-batch, after which the gradients of `shards` are whole sums.

        Returns:
            `TokenLoss` of this process's rows, detached, on the device.
        """

    def clip_and_step(self, loss: float) -> StepResult:
        """Clip, take one optimizer step, and clear the gradients.

        If the gradient norm or `loss` (the step's, over all processes) is not finite the step is skipped.
        """
        if self.in_backward is None:
            result = self._step(loss)
        else:
            result = StepResult(self.in_backward.norm, self.in_backward.skipped or not math.isfinite(loss))
        if self.in_backward is not None or not result.skipped:
            self._after_step()
        self.optimizer.zero_grad()
        return result

    def _step(self, loss: float) -> StepResult:
        self._add_penalties()
        norm = self._gradient_norm()
        finite = math.isfinite(norm.item()) and math.isfinite(loss)
        if finite:
            self._clip(norm)
        self._update(finite)
        return StepResult(grad_norm=norm.item(), skipped=not finite)

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
        """Step the parameters along their gradients, if these are finite."""
        if finite:
            self.optimizer.step()

    def _gradients(self) -> list[Tensor]:
        """This process's part of each gradient."""
        return [local(p.grad) for p in self.optimizer.parameters if p.grad is not None]

    @torch.no_grad()
    def _gradient_norm(self) -> Tensor:
        """L2 norm of the whole gradient."""
        squares = torch.stack(torch._foreach_norm(self._gradients(), dtype=torch.float32)).square().sum()
        anyone = next(iter(self.optimizer.rows.values()))  # the same processes share all parameters
        return anyone.sum(squares).sqrt()

    @torch.no_grad()
    def _clip(self, norm: Tensor) -> None:
        if self.clip is None:
            return
        if self.clip_by == "global":
            factor = self.clip / (norm + 1e-6)
            if factor < 1:  # else all gradients would be read and written for nothing
                torch._foreach_mul_(self._gradients(), factor)
            return
        for p in self.optimizer.parameters:
            if p.grad is not None:
                clip_one(p, self.optimizer.rows[p], self._clip_of_one())

    def _clip_of_one(self) -> float | None:
        """The largest norm of one parameter's gradient, so that all together have `clip` at the most."""
        return None if self.clip is None else self.clip / math.sqrt(len(self.optimizer.parameters))

    # --- between steps -----------------------------------------------------------------------------------------------

    def revise(self, step: int) -> None:
        """Let the layers that have something to do when `step` steps are done do it, optimizer states included."""
        if revise_layers(self.shards, self.optimizer, step, self.seed):
            self._publish()

    def resize(self, model: PreTrainedModel, make_optimizer: MakeOptimizer) -> None:
        """Go on with a model on meta that differs from the present one by smaller ranks: it takes over the leading
        part of each parameter and optimizer state."""
        old, old_optimizer = self.shards, self.optimizer
        if self.compile:
            torch.compiler.reset()  # the old shapes' graphs count towards the limit of recompilations
        self.prepare(model, self.seed, make_optimizer, fresh=False)
        carry_over(old, old_optimizer, self.shards, self.optimizer)
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizer in the canonical form: keyed by qualified parameter names, unsharded shapes. They are the
        tensors themselves, so what is read into them is there."""
        return {"model": get_model_state_dict(self.shards), "optimizer": self.optimizer.named_state()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, filled in place or with other tensors of the same shards."""
        for part, own in self.state_dict().items():
            for name, value in own.items():
                local(value).copy_(local(state[part][name]))
        self._publish()
