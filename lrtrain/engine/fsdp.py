"""Fully sharded data parallelism by torch's FSDP2, block by block; HSDP with `replicas` > 1."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from lrtrain.distributed import World, total
from lrtrain.engine.base import Engine, StepResult
from lrtrain.engine.in_backward import InBackward, clip_one
from lrtrain.engine.revision import revise_layers
from lrtrain.errors import ConfigError
from lrtrain.initialize import materialize
from lrtrain.loss import next_token_loss
from lrtrain.model import blocks, factorized_layers
from lrtrain.optim.base import ShardedOptimizer
from lrtrain.resize import carry_over

GRAPHS_PER_BLOCK = 16


class FSDPEngine(Engine):
    """FSDP2 over all processes.

    Args:
        dtype: of activations and of the gathered parameters; shards and their gradients keep the model's own.
        compile: compile each block.
        recompute_every, recompute_keep: what the backward pass recomputes; see `recompute`.
        replicas: groups of processes that each hold the whole model; shards lie within a group.

    Raises:
        ConfigError: if the processes do not divide into `replicas` groups.
    """

    def __init__(
        self,
        world: World,
        dtype: torch.dtype,
        compile: bool,
        recompute_every: int,
        recompute_keep: str,
        replicas: int,
    ):
        self.world = world
        self.dtype = dtype
        self.compile = compile
        self.recompute_every = recompute_every
        self.recompute_keep = recompute_keep
        self.mesh = device_mesh(world, replicas)

    def prepare(
        self,
        model: PreTrainedModel,
        seed: int,
        make_optimizer: Callable[[PreTrainedModel], ShardedOptimizer],
        fresh: bool = True,
    ) -> None:
        recompute(model, self.recompute_every, self.recompute_keep)
        if self.compile:
            # All blocks share one function: each may need graphs of its own, for its ranks and in its modes.
            torch._dynamo.config.recompile_limit = GRAPHS_PER_BLOCK * len(blocks(model))
            torch._dynamo.config.accumulated_recompile_limit = 4 * torch._dynamo.config.recompile_limit
            for block in blocks(model):
                block.compile()
        own_dtype = next(model.parameters()).dtype
        if self.world.size > 1 or self.dtype != own_dtype:  # else there is nothing to share and nothing to cast
            self._shard(model)
        materialize(model, seed, self.world.device, fresh)
        self.seed = seed
        self.model = model.train()
        self.layers = [*factorized_layers(model).values()]
        self.optimizer = make_optimizer(model)
        self.in_backward = InBackward(self.optimizer, self._clip_of_one) if self.optimizer.in_backward else None

    def _clip_of_one(self) -> float | None:
        """The largest norm of one parameter's gradient, so that all together have `clip` at the most."""
        return None if self.clip is None else self.clip / math.sqrt(len(self.optimizer.names))

    def _shard(self, model: PreTrainedModel) -> None:
        policy = MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32)
        head = model.get_output_embeddings()
        for unit in (*sharded_units(model), model):
            sharded = fully_shard(unit, mesh=self.mesh, mp_policy=policy, reshard_after_forward=unit is not head)
            sharded.set_gradient_divide_factor(1.0)  # sum the gradients: the loss is divided by all tokens already
            sharded.set_force_sum_reduction_for_comms(True)

    def begin_step(self, step: int, lr: float, clip: float | None, clip_by: str) -> None:
        self.clip, self.clip_by = clip, clip_by
        pace = next((layer.lr_factor(step) for layer in self.layers if layer.paced), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"] * (pace if group["paced"] else 1.0)
        if self.in_backward is not None:
            self.in_backward.begin()

    def forward_backward(self, rows: Tensor, tokens: int) -> Tensor:
        loss = next_token_loss(self.model, rows.to(self.world.device, non_blocking=True))
        if self.in_backward is None or math.isfinite(total(loss.item())[0]):
            (loss / tokens).backward()
        return loss.detach()

    def clip_and_step(self, loss: float) -> StepResult:
        if self.in_backward is None:
            result = self._step(loss)
        else:
            result = StepResult(self.in_backward.norm, self.in_backward.skipped or not math.isfinite(loss))
        if self.in_backward is not None or not result.skipped:
            with torch.no_grad():
                for layer in self.layers:
                    layer.after_step()
        self.optimizer.zero_grad()
        return result

    def _step(self, loss: float) -> StepResult:
        for layer in self.layers:
            layer.add_penalty()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        finite = math.isfinite(norm.item()) and math.isfinite(loss)
        if finite:
            if self.clip is not None and self.clip_by == "global":
                clip_grads_with_norm_(parameters, self.clip, norm)
            elif self.clip is not None:
                for p in parameters:
                    clip_one(p, self.optimizer.rows[p], self._clip_of_one())
            self.optimizer.step()
        return StepResult(grad_norm=norm.item(), skipped=not finite)

    def revise(self, step: int) -> None:
        revise_layers(self.model, self.optimizer, step, self.seed)

    def resize(self, model: PreTrainedModel, make_optimizer: Callable[[PreTrainedModel], ShardedOptimizer]) -> None:
        old, old_optimizer = self.model, self.optimizer
        if self.compile:
            torch.compiler.reset()  # the old shapes' graphs count towards the limit of recompilations
        self.prepare(model, self.seed, make_optimizer, fresh=False)
        carry_over(old, old_optimizer, self.model, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {"model": get_model_state_dict(self.model), "optimizer": self.optimizer.named_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.model, state["model"])
        for name, value in self.optimizer.named_state().items():
            if value is not state["optimizer"][name]:
                value.copy_(state["optimizer"][name])


def sharded_units(model: PreTrainedModel) -> list[nn.Module]:
    """What is gathered as one, besides what is left of the model: each block, and embedding and head, unless these
    share their weight."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tied = len({id(p) for module in ends for p in module.parameters()}) < len(ends)
    return [*blocks(model), *([] if tied else ends)]


def device_mesh(world: World, replicas: int) -> DeviceMesh:
    """(shard,) over all processes, or (replicate, shard) with `replicas` groups."""
    if world.size % replicas:
        raise ConfigError(f"engine.replicas={replicas} does not divide the {world.size} processes")
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def recompute(model: PreTrainedModel, every: int, keep: str) -> None:
    """Run every `every`-th block again in the backward pass (0: none) and keep only the block's inputs (`inputs`) or
    also the products A x of its factorized layers (`bottleneck`), which then are not computed a second time."""
    contexts = {}
    if keep == "bottleneck":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, keep_latents(model))
    if every:
        for block in list(blocks(model))[::every]:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **contexts)


def keep_latents(model: PreTrainedModel) -> Callable[..., CheckpointPolicy]:
    """The policy that keeps the products of activations and a transposed A (in, rank), told by its shape."""
    shapes = {(layer.in_features, layer.rank) for layer in factorized_layers(model).values()}

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        latent = operator == torch.ops.aten.mm.default and tuple(args[1].shape) in shapes
        return CheckpointPolicy.MUST_SAVE if latent else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
